"""A saved cache goes on as if it had never left memory, and a file that does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.model.parallel import layer_devices
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.saved.cachefile import CacheFileError
from kvcompress.runtime.saved.persist import load_cache, save_cache
from kvcompress.runtime.store.state import LayerSettings
from tests.runtime.models import VOCAB, build, prompts

ROOT = Path(__file__).parents[2]
PADS = [7, 0]
SETTINGS = {
    "sink_tokens": 2,
    "recent_tokens": 5,
    "punct_ids": tuple(range(5, 13)),
    "special_ids": (30, 31),
}


def heads_of(**storage) -> list[HeadPlan]:
    return [
        HeadPlan(frequent=Budget(tokens=9), **storage),
        HeadPlan(punct=True, frequent=Budget(ratio=0.1), local=Budget(ratio=0.3), **storage),
        HeadPlan(full=True, **storage),
        HeadPlan(special=True, local=Budget(tokens=12), **storage),
    ]


def plan_for(model, heads: list[HeadPlan], **settings) -> Plan:
    """Another policy for each head, in turn."""
    shape = shape_of(model.config, model.dtype)
    plan = uniform(shape, HeadPlan(), **{**SETTINGS, **settings})
    rows = tuple(
        tuple(heads[(2 * layer + h) % len(heads)] for h in range(shape.heads_of(layer)))
        for layer in range(shape.layers)
    )
    return plan.model_copy(update={"heads": rows})


def params_for(plan: Plan, seed: int = 5) -> KVParams:
    generator = torch.Generator().manual_seed(seed)
    size = (plan.model.layers, max(map(len, plan.heads)), plan.model.head_dim)
    center = 0.3 * torch.randn(size, generator=generator)
    return KVParams(tuple(center), tuple(0.5 + torch.rand(size, generator=generator)))


MIXED = [
    HeadPlan(frequent=Budget(tokens=9), k_dtype="int8", v_dtype="int4"),
    HeadPlan(punct=True, local=Budget(ratio=0.3), k_dtype="fp8", v_dtype="model"),
    HeadPlan(full=True, k_dtype="int4", v_dtype="int8"),
    HeadPlan(special=True, frequent=Budget(tokens=5), k_dtype="model", v_dtype="fp8"),
]
STORED = {
    dtype: heads_of(k_dtype=dtype, v_dtype=dtype) for dtype in ("int8", "int4", "fp8", "model")
}
CASES = [
    *(("llama", name) for name in STORED),
    ("mistral", "mixed"),
    ("gemma2", "int8"),
    ("llama4", "mixed"),
    ("gemma3n", "int8"),
    ("qwen3_next", "int4"),
    ("gpt_oss", "fp8"),
    ("deepseek_v3", "mixed"),
]
TURNS = (1, 1, 9, 1, 1, 1, 1, 1)  # the long row takes its 72nd token, where blocks of slots grow


@torch.no_grad()
def talk(model, cache, pads: list[int], *turns: int) -> torch.Tensor:
    """Feed pseudo-random turns of so many tokens; all their last logits ``[turns, B, vocab]``."""
    seen = cache.get_seq_length()
    generator = torch.Generator().manual_seed(seen)
    logits = []
    for turn in turns:
        ids = torch.randint(3, VOCAB, (len(pads), turn), generator=generator)
        mask = torch.ones(len(pads), seen + turn, dtype=torch.long)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        ids[mask[:, seen:] == 0] = 2
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **as_argument(cache)
        )
        logits.append(out.logits[:, -1])
        seen += turn
    return torch.stack(logits)


def filled(family: str, heads: str):
    """A model and its cache after a prompt, some answers and a second turn."""
    model = build(family)
    plan = plan_for(model, STORED.get(heads, MIXED), turn_tokens=2)
    attach(model, plan, params_for(plan))
    cache = new_cache(model, protect=[[(3, 9), (30, 35)], [(20, 24)]])
    talk(model, cache, PADS, 40, 1, 1, 1, 12, 1, 1)
    return model, cache


@pytest.fixture(scope="module")
def mixed():
    return filled("llama", "mixed")


@pytest.fixture
def saved(mixed, tmp_path):
    path = tmp_path / "cache.kvc"
    save_cache(mixed[1], path)
    return path


def assert_same(one, other, name: str = "cache") -> None:
    """Equality of every field and attribute, whether a file holds it or not."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes(), name
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, name)
    elif isinstance(one, dict):
        assert_same(list(one), list(other), name)
        assert_same(list(one.values()), list(other.values()), name)
    elif isinstance(one, LayerSettings):
        assert (one.plan, one.layer) == (other.plan, other.layer), name
    elif dataclasses.is_dataclass(one) or type(one).__module__.startswith(OWN_MODULES):
        names = _names(one) - PASSING
        assert names == _names(other) - PASSING, name
        for key in names:
            assert_same(getattr(one, key), getattr(other, key), f"{name}.{key}")
    else:
        assert one == other, name


def _names(value) -> set[str]:
    if dataclasses.is_dataclass(value):
        return {field.name for field in dataclasses.fields(value)}
    return set(vars(value))


OWN_MODULES = ("kvcompress.runtime", "transformers.cache_utils")
# of the forward that was last; what crop may take back; what one warning per cache has said
PASSING = {"forward_info", "_stored_position", "_before", "_warned"}


@pytest.mark.parametrize(("family", "heads"), CASES)
def test_a_loaded_cache_goes_on_bit_for_bit(family, heads, tmp_path):
    model, cache = filled(family, heads)
    cache.save(tmp_path / "cache.kvc")
    loaded, copied = CompressedCache.load(tmp_path / "cache.kvc", model), copy.deepcopy(cache)
    assert loaded.nbytes() == cache.nbytes()
    assert_same(loaded, cache)
    expected = talk(model, cache, PADS, *TURNS)
    for other in (loaded, copied):
        assert torch.equal(talk(model, other, PADS, *TURNS), expected)
        assert_same(other, cache)


def test_a_fresh_process_goes_on_bit_for_bit(mixed, saved, tmp_path):
    model, cache = mixed
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3]));"
        "from tests.runtime import test_persist as t; from safetensors.torch import save_file;"
        "model, _ = t.filled('llama', 'mixed'); cache = t.CompressedCache.load(sys.argv[1], model);"
        "save_file({'logits': t.talk(model, cache, t.PADS, *t.TURNS)}, sys.argv[2])"
    )
    out, threads = tmp_path / "logits.safetensors", str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", code, saved, out, threads], cwd=ROOT, check=True)
    expected = talk(model, copy.deepcopy(cache), PADS, *TURNS)
    assert torch.equal(load_file(out)["logits"], expected)


def test_a_prefix_is_computed_once(tmp_path):
    """A document is prefilled and saved; every question goes on from a copy or from the file."""
    model = build("llama")
    plan = plan_for(model, MIXED)
    attach(model, plan)
    document, questions = prompts(1, 60)["input_ids"], prompts(3, 12)["input_ids"]
    cache = CompressedCache(plan)
    with torch.no_grad():
        model(input_ids=document, **as_argument(cache))
    cache.save(tmp_path / "document.kvc")
    answers = []
    for question in questions:
        ids = torch.cat([document, question[None]], 1)
        again = CompressedCache(plan)
        with torch.no_grad():
            model(input_ids=document, **as_argument(again))
        loaded = CompressedCache.load(tmp_path / "document.kvc", model)
        loaded.check_prefix(ids)
        ways = (again, copy.deepcopy(cache), loaded)
        expected, *others = (
            model.generate(
                input_ids=ids,
                **as_argument(way),
                max_new_tokens=12,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            for way in ways
        )
        for other in others:
            assert torch.equal(other.sequences, expected.sequences)
            assert torch.equal(torch.stack(other.logits), torch.stack(expected.logits))
        answers.append(expected.sequences[0, 72:].tolist())
    assert cache.get_seq_length() == 60
    assert len({tuple(answer) for answer in answers}) == 3


# ---- the file
def test_any_reader_of_safetensors_finds_the_tensors(mixed, saved):
    states = [layer.state for layer in mixed[1].layers]
    held = load_file(saved)
    assert sum(t.nbytes for t in held.values()) == sum(
        t.nbytes for state in states for t in state.tensors() if t.dtype != torch.int64
    )
    for number, state in enumerate(states):
        assert torch.equal(held[f"layers.{number}.state.exact_k"], state.exact_k)
        for index, group in enumerate(state.groups):
            name = f"layers.{number}.state.groups.{index}"
            assert torch.equal(held[f"{name}.windows"], group.windows)
            keys = held[f"{name}.store.keys.data"]
            assert torch.equal(keys.view(torch.uint8), group.store.keys.data.view(torch.uint8))
    with safe_open(saved, "pt") as file:
        assert file.metadata()["tokens"] == "57"


def test_a_file_is_the_compressed_bytes_and_a_small_header(mixed, saved):
    _, cache = mixed
    header = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    batch, shape = len(PADS), cache.plan.model
    rebuilt = 2 * 8 * batch * shape.layers * shape.kv_heads  # where segments lie
    assert saved.stat().st_size == cache.nbytes() - rebuilt + header
    assert header < 8000


# ---- what is refused
def test_a_cache_of_something_else_is_refused(mixed, saved):
    model, cache = mixed
    plan, params = cache.plan, cache.params
    load_cache(CompressedCache, saved, plan, params, dtype=torch.float32)
    other = plan_for(build("llama_mha"), MIXED)
    with pytest.raises(CacheFileError, match="made with another model.*config_hash"):
        load_cache(CompressedCache, saved, other, params)
    other = plan.model_copy(update={"sink_tokens": 3})
    with pytest.raises(CacheFileError, match="made with another plan"):
        load_cache(CompressedCache, saved, other, params)
    for wrong in (None, params_for(plan, seed=6)):
        with pytest.raises(CacheFileError, match="made with other key constants"):
            load_cache(CompressedCache, saved, plan, wrong)
    with pytest.raises(CacheFileError, match="another dtype.*dtype float32, here bfloat16"):
        load_cache(CompressedCache, saved, plan, params, dtype=torch.bfloat16)
    with pytest.raises(KVCompressError, match="no plan"):
        CompressedCache.load(saved, build("llama"))


def test_a_cache_that_holds_nothing_or_half_a_forward_is_not_saved(mixed, tmp_path):
    model, cache = mixed
    with pytest.raises(CacheFileError, match="the cache is empty"):
        save_cache(CompressedCache(cache.plan, cache.params), tmp_path / "cache.kvc")
    half = copy.deepcopy(cache)
    half.note_forward(None, 1)
    half.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    with pytest.raises(KVCompressError, match="layer 0: save the cache between two forwards"):
        save_cache(half, tmp_path / "cache.kvc")
    assert list(tmp_path.iterdir()) == []


def test_what_waits_must_be_settled_before_a_save(mixed, tmp_path):
    model, cache = mixed
    path = tmp_path / "cache.kvc"
    held = new_cache(model, compress="after_prefill")
    talk(model, held, PADS, 20)
    with pytest.raises(KVCompressError, match=r"held uncompressed; call cache\.end_prefill\(\)"):
        held.save(path)
    held.end_prefill()
    held.save(path)
    assert_same(CompressedCache.load(path, model), held)
    drafting = copy.deepcopy(cache)
    drafting.activate_past_recording()
    talk(model, drafting, PADS, 3)
    with pytest.raises(KVCompressError, match=r"drafted tokens .*; call cache\.crop\(0\) first"):
        drafting.save(path)
    drafting.crop(-2)
    assert drafting.seen_text.tokens == drafting.get_seq_length() == 58
    drafting.save(path)
    assert_same(CompressedCache.load(path, model), drafting)
    with pytest.raises(CacheFileError, match="an? Other cannot be saved"):
        type("Other", (CompressedCache,), {})(cache.plan).save(path)


def test_a_cache_loaded_for_inference_goes_on_in_any_mode(mixed, saved):
    model, cache = mixed
    with torch.inference_mode():
        loaded = CompressedCache.load(saved, model)
    copied = copy.deepcopy(cache)
    assert torch.equal(talk(model, loaded, PADS, *TURNS), talk(model, copied, PADS, *TURNS))


def test_rows_that_moved_are_saved(mixed, tmp_path):
    model, cache = mixed
    moved = copy.deepcopy(cache)
    moved.batch_repeat_interleave(2)
    moved.reorder_cache(torch.tensor([3, 0, 0, 1]))
    moved.save(tmp_path / "cache.kvc")
    loaded = CompressedCache.load(tmp_path / "cache.kvc", model)
    assert_same(loaded, moved)
    pads = [PADS[1], PADS[0], PADS[0], PADS[0]]
    assert torch.equal(talk(model, loaded, pads, *TURNS), talk(model, moved, pads, *TURNS))


def test_layers_go_where_the_model_computes(mixed):
    model, _ = mixed
    assert layer_devices(model) == [torch.device("cpu")] * 2
