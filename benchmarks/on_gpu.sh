#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go: tests, a retrained demo model, peak memory.
#
#     bash benchmarks/on_gpu.sh OUT [WHEELS]
#
# OUT receives every result. WHEELS is a folder of wheels for a machine without network that lacks
# pydantic, typer or rich; leave it out where they are installed.
set -euo pipefail
out=${1:?usage: bash benchmarks/on_gpu.sh OUT [WHEELS]}
mkdir -p "$out"
if [ -n "${2:-}" ]; then
  python -m pip install --quiet --no-index --find-links "$2" pydantic typer rich pytest
fi
export PYTHONPATH=$PWD
python - > "$out/conditions.txt" <<'PY'
import platform, torch, transformers
print("python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name(), torch.version.cuda)
PY
python -m pytest -q -m gpu tests | tee "$out/gpu_tests.txt"
python benchmarks/peak_memory.py --json > "$out/peak_memory.json"
python tools/train_demo_model.py -o "$out/demo" --minutes "${MINUTES:-8}" --device cuda --no-compile \
  | tee "$out/training.log"
rm -f "$out/demo/checkpoint.pt"
