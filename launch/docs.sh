#!/usr/bin/env bash
# Builds the documentation site into build/site; a warning, a broken link or a missing page fails it.
#
#   launch/docs.sh           builds it
#   launch/docs.sh --serve   serves it on this machine, and builds it again when a page changes
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval dev
# Of the next version of mkdocs, which material's authors warn of; not about this site.
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true CUDA_VISIBLE_DEVICES=""
if [ "${1:-}" = --serve ]; then
    exec mkdocs serve
fi
mkdocs build --strict --quiet
echo "build/site/index.html: $(find build/site -name '*.html' | wc -l) pages"
