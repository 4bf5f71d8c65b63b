"""Print what vLLM asks for beside torch and the packages for pictures and sound, one per line.

    .venv-vllm/bin/python benchmarks/vllm_cpu/requirements.py

vLLM imports and runs text models without those; they would bring another build of torch.
"""

from __future__ import annotations

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
