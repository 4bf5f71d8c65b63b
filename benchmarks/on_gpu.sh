#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go:
#
#     bash benchmarks/on_gpu.sh OUT [WHEELS]
#
# OUT receives every result. WHEELS is a folder of wheels for a machine without network that lacks
# pydantic, typer or rich; leave it out where they are installed. STEPS picks and orders what runs:
#
#     tests  the tests marked `gpu`                                          (minutes)
#     gpu    decode speed: kernels, models, fixed memory; benchmarks/gpu.py  (GPU_MINUTES, 8.5)
#     tune   settings of the kernels for this architecture, into OUT         (TUNE_MINUTES, 6)
#     peak   peak memory of a generation
#     train  the demo model, from nothing                                    (MINUTES, 8)
#
# A device that is lent for minutes: STEPS="tests gpu". A step that fails is told at the end, and the
# others still run.
set -euo pipefail
out=${1:?usage: bash benchmarks/on_gpu.sh OUT [WHEELS]}
mkdir -p "$out"
if [ -n "${2:-}" ]; then
  python -m pip install --quiet --no-index --find-links "$2" pydantic typer rich pytest
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python - > "$out/conditions.txt" <<'PY'
import platform, torch, transformers
from kvcompress.kernels.available import triton_status
print("python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name(), torch.version.cuda)
print(triton_status("cuda"))
PY
cat "$out/conditions.txt"

run_step() {
  case $1 in
    tests) python -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu_tests.txt" ;;
    gpu) python benchmarks/gpu.py "$out/gpu.json" --minutes "${GPU_MINUTES:-8.5}" 2>&1 \
      | tee "$out/gpu.log" ;;
    tune) python benchmarks/tune_triton.py --out "$out/tuning.json" \
      --minutes "${TUNE_MINUTES:-6}" 2>&1 | tee "$out/tuning.log" ;;
    peak) python benchmarks/peak_memory.py --json > "$out/peak_memory.json" ;;
    train) python tools/train_demo_model.py -o "$out/demo" --minutes "${MINUTES:-8}" \
      --device cuda --no-compile | tee "$out/training.log" && rm -f "$out/demo/checkpoint.pt" ;;
    *) echo "no step is called $1" >&2; return 2 ;;
  esac
}

failed=""
for step in ${STEPS:-tests gpu peak train}; do
  run_step "$step" || failed="$failed $step"
done
if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
