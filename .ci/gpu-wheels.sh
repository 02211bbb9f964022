#!/usr/bin/env bash
# Puts the wheels that `make gpu` needs on a machine without a network into .gpu-wheels: at most 40 MB.
# PYTHON_VERSION is that of the other machine, which runs Linux on x86-64.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rm -rf .gpu-wheels
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
  -c constraints.txt -d .gpu-wheels -r .ci/gpu-requirements.txt
kilobytes=$(du -sk .gpu-wheels | cut -f1)
echo "$(find .gpu-wheels -name '*.whl' | wc -l) wheels, $((kilobytes / 1000)) MB in .gpu-wheels"
[ "$kilobytes" -le 40000 ] || { echo "expected at most 40 MB" >&2; exit 1; }
