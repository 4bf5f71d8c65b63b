"""One process of a tensor parallel model; `test_parallel.py` starts two of them.

    python -m tests.runtime.tp_worker FOLDER RANK SIZE

Reads ``job.json`` in FOLDER and leaves ``rank{RANK}.json`` and ``rank{RANK}.safetensors``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.attached import device_mesh
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.model.parallel import mesh_of
from kvcompress.runtime.names import cache_of

STEPS = 24


def greedy(model, inputs):
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def run(folder: Path, rank: int, size: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    inputs = load_file(folder / "inputs.safetensors")
    model = _load(folder / "model")
    params = KVParams.load(folder / "params.safetensors", shape_of(model.config))
    report = {"mesh": mesh_of(model, device_mesh), "bytes": {}}
    tensors = {}
    for name in json.loads((folder / "job.json").read_text())["plans"]:
        attach(model, Plan.load(folder / f"{name}.json"), params)
        out = greedy(model, inputs)
        tensors[f"{name}.tokens"] = out.sequences.contiguous()
        tensors[f"{name}.logits"] = torch.stack(out.logits, 1).contiguous()
        report["bytes"][name] = cache_of(out).nbytes()
        report["heads"] = cache_of(out).layers[0].state.exact_k.shape[1]
    tensors["k_center"] = torch.stack(cache_of(out).params.k_center)
    try:
        attach(_load(folder / "narrow"), Plan.load(folder / "narrow.json"))
    except UnsupportedModelError as error:
        report["refused"] = str(error)
    save_file(tensors, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation="sdpa"
    ).eval()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
