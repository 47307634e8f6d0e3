#!/usr/bin/env bash
# One call on a machine with a GPU, less than ten minutes, no network: build for that GPU, check the CUDA path of every
# op against its reference, time it, and write <device>.json to $OUT (bench/results unless set).
#
# Wants Python 3.11+, torch 2.11+ with CUDA, triton 3.6+, pybind11, scikit-build-core, ninja and nvcc. Where gemmi is
# missing too, put its wheel into a folder and name that in $WHEELS.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=build/gpu-site
"$python" -c 'import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} sees no GPU; python bench/gpu_check.py --device cpu rehearses the checks")'
arch=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')
mkdir -p "$site"
if ! "$python" -c 'import gemmi' 2>/dev/null; then
  "$python" -m pip install -q --no-index --find-links "${WHEELS:?gemmi is missing: set WHEELS to a folder with its wheel}" \
    --target "$site" --upgrade --no-deps gemmi
fi
# into a folder of its own: nothing that the machine has is changed
XTALFAST_CUDA=ON CMAKE_ARGS="-DXTALFAST_CUDA_ARCHS=$arch" \
  "$python" -m pip install -q --no-build-isolation --no-deps --target "$site" --upgrade .
export PYTHONPATH="$PWD/$site" TRITON_DEFAULT_FP_FUSION=1
exec "$python" bench/gpu_check.py --out "${OUT:-bench/results}" "$@"
