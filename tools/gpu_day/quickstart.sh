#!/usr/bin/env bash
# The whole path, text to report, in its short form with this Python: launch/quickstart.sh into $WORK.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$WORK/bin"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" >"$WORK/bin/python"
printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' "$PYTHON" >"$WORK/bin/torchrun"
chmod +x "$WORK/bin/python" "$WORK/bin/torchrun"
PATH=$WORK/bin:$PATH VENV=none NPROC=1 RUN=$WORK/quickstart exec launch/quickstart.sh --short
