"""Every Triton kernel compiles to machine code, on any machine with Triton; and the packed
instructions that only a GPU runs give the numbers of the plain form."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvcompress.kernels.view import KeyConstants, PromptView, Reach, Softmax, VotersView
from kvcompress.quant.codec import value_groups
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.static import cache as static
from kvcompress.runtime.static.cache import StaticCompressedCache
from tests.kernels.ahead import compiling_for
from tests.kernels.cases import empty_codes, random, split
from tests.runtime.models import prompts
from tests.runtime.test_static import HEADS, decode, one_layer, plan_for

# Triton 3.9 warns that a default of the GPU compiler will change
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra: gpu)"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs as an interpreter here"
    ),
]
CODED = [("int8", 90), ("int4", 90), ("fp8", 90), ("model", 90), ("int8", 80)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("storage", "capability"), CODED)
def test_decode_pieces_uses_wide_loads_and_the_matrix_units(storage, capability):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split(storage, storage, 128, 128, 4, torch.bfloat16, capacities=(64,))
    with compiling_for(capability) as compiled:
        case.run(decode_pieces)
    ptx = compiled["_split"].asm["ptx"]
    kind = "bf16" if storage == "model" else "f16"
    assert re.search(rf"mma(\.\w+)*\.sync\.aligned\.m\d+n8k16(\.\w+)*\.f32\.{kind}\.{kind}", ptx)
    # rows of codes are fetched 16 bytes at a time, into shared memory or into registers
    wide = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10", ptx)
    wide += re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32", ptx)
    assert len(wide) >= 4
    assert compiled["_split"].asm["cubin"]


@pytest.mark.parametrize("storage", ["rot4", "rot3", "rot2"])
def test_levels_are_read_for_the_matrix_units(storage):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split(storage, storage, 128, 128, 4, torch.bfloat16, capacities=(64,))
    with compiling_for(90) as compiled:
        case.run(decode_pieces)
    ptx = compiled["_split"].asm["ptx"]
    assert re.search(r"mma(\.\w+)*\.sync\.aligned\.m\d+n8k16(\.\w+)*\.f32\.f16\.f16", ptx)
    assert compiled["_split"].asm["cubin"]


def test_a_step(monkeypatch):
    monkeypatch.setattr(static, "choose_kernels", lambda *arguments: True)
    model = one_layer("gemma2").to(torch.bfloat16)
    plan = plan_for(
        model, HEADS["fastgen"].model_copy(update={"k_dtype": "rot4", "v_dtype": "rot3"})
    )
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=40, protect=[(3, 6)])
    with compiling_for(90) as compiled:
        decode(model, model, cache, prompts(2, 28, [3, 0]), 1)
    assert set(compiled) == {"_split", "_combine", "_advance", "_select", "_append"}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())


@pytest.mark.parametrize("storage", ["int8", "int4", "fp8", "rot4", "rot3", "rot2"])
def test_the_kernels_of_a_prompt(storage):
    from kvcompress.kernels.compact_quantize.triton import compact_quantize
    from kvcompress.kernels.prefill_colsum.triton import prefill_colsum

    dim = 128
    key = random(1, 2, 9, dim, seed=1).bfloat16()
    kept = torch.zeros(3, 5, dtype=torch.int64)
    constants = KeyConstants(random(2, dim, seed=3), random(2, dim, seed=4))
    codes = [
        empty_codes(storage, 9, dim, groups, torch.bfloat16)
        for groups in (1, value_groups(storage, dim))
    ]
    with compiling_for(90) as compiled:
        compact_quantize(PromptView(key, key, kept, torch.arange(5)), constants, *codes)
        first, weight = torch.zeros(1, dtype=torch.int64), torch.ones(1, 9)
        lse, query = random(1, 8, 9, seed=5), key.repeat(1, 4, 1, 1)
        voters = VotersView(query, key, lse, torch.arange(9), weight, first)
        prefill_colsum(voters, Softmax(0.1), Reach(0, 0))
    assert set(compiled) == {"_compact", "_colsum"}
    assert re.search(r"mma(\.\w+)*\.sync", compiled["_colsum"].asm["ptx"])


# ---- the packed instructions, by hand
ALL_WORDS = np.arange(1 << 16, dtype=np.uint32)


def execute(asm: str, word: np.ndarray) -> np.ndarray:
    """Registers of two equal words through the instructions of `unpacking`; the low half."""
    registers = {"$1": word | (word << np.uint32(16))}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in asm.strip("{} ").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        to, *names = [n.strip() for n in rest.split(",")]
        registers[to] = INSTRUCTIONS[op](*map(value, names)).astype(np.uint32)
    return (registers["$0"] & 0xFFFF).astype(np.uint16).view(np.float16)


def permute(a, b, selector):
    both = [(x >> np.uint32(8 * i)) & 255 for x in (a, b) for i in range(4)]
    picks = [(int(selector) >> (4 * i)) & 15 for i in range(4)]
    return sum((both[p].astype(np.uint32) << np.uint32(8 * i) for i, p in enumerate(picks)))


def half_minus(a, b):
    halves = [
        ((x >> np.uint32(s)) & 0xFFFF).astype(np.uint16).view(np.float16)
        for x in (a, b)
        for s in (0, 16)
    ]
    low, high = halves[0] - halves[2], halves[1] - halves[3]
    return low.view(np.uint16).astype(np.uint32) | (high.view(np.uint16).astype(np.uint32) << 16)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c}[int(table)],
    "prmt.b32": permute,
    "sub.f16x2": half_minus,
}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (kind, part)
        for kind, parts in (("int8", 2), ("int4", 4), ("fp8", 2))
        for part in range(parts)
    ],
)
def test_packed_instructions(kind, part):
    from kvcompress.kernels import triton_tiles

    got = execute(triton_tiles.unpacking(kind, part), ALL_WORDS).astype(np.float64)
    byte = (ALL_WORDS >> (8 * (part // 2 if kind == "int4" else part))) & 255
    if kind == "fp8":
        codes = torch.from_numpy(byte.astype(np.uint8)).view(torch.float8_e4m3fn)
        number = codes.double().numpy()
        real = np.isfinite(number)  # the two patterns of NaN are never stored
        assert real.sum() == len(real) * 254 // 256
        got, number = got[real], number[real]
    else:
        code = byte if kind == "int8" else (byte >> 4 if part % 2 else byte & 15)
        number = code.astype(np.float64) - triton_tiles.zero_of(kind)
    assert np.array_equal(got * triton_tiles.factor_of(kind, part), number)
