#!/usr/bin/env bash
# Builds the documentation site into build/site; a warning, a broken link or a missing page fails it.
#
#   launch/docs.sh           builds it
#   launch/docs.sh --serve   serves it on this machine, and builds it again when a page changes
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval dev
# The theme says at every start that it is maintained until 2027-05-05, and Zensical, which reads mkdocs.yml, after that.
export NO_MKDOCS_2_WARNING=true CUDA_VISIBLE_DEVICES=""
if [ "${1:-}" = --serve ]; then
    exec mkdocs serve
fi
mkdocs build --strict --quiet
echo "build/site/index.html: $(find build/site -name '*.html' | wc -l) pages"
