"""Two processes that share a model's heads give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from kvcompress import accounting
from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, uniform
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.model.parallel import mesh_of, shard_params, shard_plan
from kvcompress.runtime.names import cache_of
from tests.runtime import tp_worker
from tests.runtime.models import prompts

ROOT = Path(__file__).parents[2]
SIZE = 2
VOCAB = 98  # transformers 5.17 wants one that the processes divide
PADS = [7, 0]
HEADS = (
    HeadPlan(frequent=Budget(tokens=9)),
    HeadPlan(local=Budget(tokens=12), v_dtype="int4"),
    HeadPlan(punct=True, frequent=Budget(ratio=0.1), local=Budget(ratio=0.15)),
    HeadPlan(full=True),
)
SETTINGS = {"sink_tokens": 2, "recent_tokens": 5, "punct_ids": tuple(range(5, 13))}
STEPS = tp_worker.STEPS


def model_of(kv_heads: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0 if "layers" in name else 10.0)
    model.generation_config.pad_token_id = 2
    return model


def plans_of(shape: ModelShape) -> dict[str, Plan]:
    """Another policy for every head: uncoded with class tokens, and in codes without."""

    def plan(**changes) -> Plan:
        rows = tuple(
            tuple(
                HeadPlan.model_validate({**HEADS[(layer + h) % 4].model_dump(), **changes})
                for h in range(4)
            )
            for layer in range(2)
        )
        return uniform(shape, HEADS[0], **SETTINGS).model_copy(update={"heads": rows})

    return {"exact": plan(k_dtype="model", v_dtype="model"), "codes": plan(punct=False)}


def params_of(shape: ModelShape) -> KVParams:
    generator = torch.Generator().manual_seed(5)
    size = (shape.layers, shape.kv_heads, shape.head_dim)
    center = 0.3 * torch.randn(size, generator=generator)
    return KVParams(tuple(center), tuple(0.5 + torch.rand(size, generator=generator)))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs the two processes; the model, what it was asked, and what each process left."""
    folder = tmp_path_factory.mktemp("parallel")
    model, narrow = model_of(4), model_of(1)
    model.save_pretrained(folder / "model")
    narrow.save_pretrained(folder / "narrow")
    shape, inputs = (
        shape_of(model.config, model.dtype),
        {k: v.contiguous() for k, v in prompts(2, 48, PADS).items()},
    )
    plans, params = plans_of(shape), params_of(shape)
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(plan.to_json())
    one = uniform(shape_of(narrow.config, narrow.dtype), HEADS[0])
    (folder / "narrow.json").write_text(one.to_json())
    (folder / "job.json").write_text(json.dumps({"plans": list(plans)}))
    params.save(folder / "params.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    found = _run(folder)
    expected = {
        name: tp_worker.greedy(attach(model, plan, params), inputs) for name, plan in plans.items()
    }
    return SimpleNamespace(plans=plans, params=params, found=found, expected=expected)


def _run(folder: Path) -> list[SimpleNamespace]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.tp_worker", str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(SIZE)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        texts = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * SIZE, "\n".join(texts)
    return [
        SimpleNamespace(
            report=json.loads((folder / f"rank{rank}.json").read_text()),
            tensors=load_file(folder / f"rank{rank}.safetensors"),
        )
        for rank in range(SIZE)
    ]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("exact", 1e-5),  # the sums over heads are added in another order; logits reach 10
        ("codes", 3e-3),  # and so a code may round the other way
    ],
)
def test_two_processes_equal_one(job, name, tolerance):
    expected = job.expected[name]
    for rank, found in enumerate(job.found):
        assert found.report["mesh"] == [rank, SIZE]
        assert found.report["heads"] == 4 // SIZE
        assert torch.equal(found.tensors[f"{name}.tokens"], expected.sequences)
        logits = found.tensors[f"{name}.logits"]
        torch.testing.assert_close(logits, torch.stack(expected.logits, 1), atol=tolerance, rtol=0)
        own = shard_params(job.params, rank, SIZE)
        assert torch.equal(found.tensors["k_center"], torch.stack(own.k_center))


def test_each_process_holds_what_its_part_of_the_plan_says(job):
    prompt = [48 - pad for pad in PADS]
    seen = [length + STEPS - 1 for length in prompt]
    for rank, found in enumerate(job.found):
        own = shard_plan(job.plans["codes"], rank, SIZE)
        assert found.report["bytes"]["codes"] == accounting.cache_bytes(own, seen, prompt)


def test_all_processes_hold_every_head_once(job):
    def of_heads(held_bytes: int, plan: Plan) -> int:
        return held_bytes - sum(accounting.layer_shared_bytes(plan, i, len(PADS)) for i in (0, 1))

    for name, plan in job.plans.items():
        parts = [
            of_heads(found.report["bytes"][name], shard_plan(plan, rank, SIZE))
            for rank, found in enumerate(job.found)
        ]
        assert sum(parts) == of_heads(cache_of(job.expected[name]).nbytes(), plan)


def test_heads_that_cannot_be_shared_are_refused(job):
    for found in job.found:
        assert "kv_heads is 1, which 2 tensor parallel processes" in found.report["refused"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_a_plan_are_the_plan(size):
    shape = shape_of(model_of(4).config)
    plan, params = plans_of(shape)["exact"], params_of(shape)
    parts = [shard_plan(plan, rank, size) for rank in range(size)]
    for layer, row in enumerate(plan.heads):
        assert sum((part.heads[layer] for part in parts), ()) == row
    constants = [shard_params(params, rank, size) for rank in range(size)]
    for name in ("k_center", "k_scale"):
        for layer, whole in enumerate(getattr(params, name)):
            assert torch.equal(torch.cat([getattr(c, name)[layer] for c in constants]), whole)
    assert len({part.to_json() for part in parts}) == size
    for part in parts:
        assert Plan.from_json(part.to_json()) == part
        assert part.model.config_hash == shape.config_hash
        assert part.model.query_heads // part.model.kv_heads == 2
    assert shard_params(None, 0, size) is None


def test_what_cannot_be_dealt_out_is_refused():
    shape = shape_of(model_of(4).config)
    plan = plans_of(shape)["exact"]
    with pytest.raises(UnsupportedModelError, match="kv_heads is 4, which 3 tensor parallel"):
        shard_plan(plan, 0, 3)
    with pytest.raises(UnsupportedModelError, match="heads is 4, which 8 tensor parallel"):
        shard_params(params_of(shape), 0, 8)
    with pytest.raises(UnsupportedModelError, match="random scorer numbers the KV heads"):
        shard_plan(plan.model_copy(update={"scorer": "random"}), 0, 2)


SHARED = {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise"}
GATHERED = dict.fromkeys(SHARED, "colwise_gather_output")
LATENT = {"layers.*.self_attn.q_b_proj": "colwise", "layers.*.mlp.up_proj": "colwise"}


class Mesh:
    """The part of a `DeviceMesh` that counts, this process at `place`."""

    def __init__(self, place: tuple[int, ...], shape: tuple[int, ...], names=None) -> None:
        self.place, self.shape, self.mesh_dim_names = place, shape, names

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def get_local_rank(self, dimension: int) -> int:
        return self.place[dimension]


@pytest.mark.parametrize(
    ("mesh", "tp_plan", "expected"),
    [
        (None, SHARED, (0, 1)),
        (Mesh((1,), (2,)), SHARED, (1, 2)),
        (Mesh((1, 0), (2, 4), ("fsdp", "tp")), SHARED, (0, 4)),  # process 4 of the world
        (Mesh((0, 1, 3), (1, 2, 4), ("pp", "fsdp", "tp")), SHARED, (3, 4)),
        (Mesh((1,), (2,), ("fsdp",)), SHARED, (0, 1)),
        (Mesh((1, 0), (2, 1), ("fsdp", "tp")), SHARED, (0, 1)),
        (Mesh((1,), (2,)), GATHERED, (0, 1)),
        (Mesh((1,), (2,)), {"layers.*.mlp.up_proj": "colwise"}, (0, 1)),
    ],
)
def test_the_block_follows_the_models_mesh(mesh, tp_plan, expected):
    assert mesh_of(SimpleNamespace(tp_plan=tp_plan), lambda model: mesh) == expected


@pytest.mark.parametrize(
    ("mesh", "tp_plan", "match"),
    [
        (Mesh((1,), (2,), ("pp",)), SHARED, "pipeline keeps other layers"),
        (Mesh((1,), (2,)), LATENT, r"cuts queries \(q_b_proj\) but not keys"),
    ],
)
def test_other_ways_to_share_a_model_are_refused(mesh, tp_plan, match):
    with pytest.raises(UnsupportedModelError, match=match):
        mesh_of(SimpleNamespace(tp_plan=tp_plan), lambda model: mesh)
