#!/usr/bin/env bash
# Fetches the wheels of wheels.txt, for Python 3.12 on x86-64 Linux, into tools/gpu_day/wheels, which git ignores.
#
#   tools/gpu_day/pack.sh
#
# Ends with status 1 if they are more than MOST_MIB (default 60): what travels to a borrowed machine has to be small.
set -euo pipefail
cd "$(dirname "$0")"
most=${MOST_MIB:-60}
python=${PYTHON:-python3}

platforms=()
for glibc in 2_17 2_24 2_27 2_28; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
rm -rf wheels
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --dest wheels --requirement wheels.txt
missing=$(grep -vc '^#' wheels.txt)
found=$(find wheels -name '*.whl' | wc -l)
size=$(du -sk wheels | cut -f1)
echo "$found of $missing wheels, $((size / 1024)) MiB, in tools/gpu_day/wheels"
[ "$found" -eq "$missing" ] && [ "$size" -le $((most * 1024)) ]
