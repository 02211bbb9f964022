#!/usr/bin/env bash
# `make gpu`: the tests of tests/gpu, then benchmarks/gpu.py, in at most 8 minutes, with the torch of $PYTHON.
# Needs no network and no Ray. Wheels in .gpu-wheels (see gpu-wheels.sh) are installed beside what is there.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d .gpu-wheels ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
    --target .gpu-site .gpu-wheels/*.whl || echo "not all of .gpu-wheels is installed; going on with what is there" >&2
  export PYTHONPATH="$PWD/.gpu-site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$PWD/.gpu-site/inductor"
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
# Warnings of libraries that are newer than those of constraints.txt are no failures here. pytest-xdist may be missing,
# so the options of pyproject.toml, of which some are its own, are left out. After 170 s pytest is interrupted, not
# killed, so that it says what has failed until then.
timeout --signal=INT --kill-after=10 170 "$python" -m pytest -m gpu tests/gpu -o addopts= -o filterwarnings=default \
  --import-mode=importlib -p no:cacheprovider -q --durations=10 -ra
tests=$?
timeout 290 "$python" -m benchmarks.gpu "$@"
benchmark=$?
exit $((tests != 0 ? tests : benchmark))
