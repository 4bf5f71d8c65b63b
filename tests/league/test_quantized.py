"""transformers' QuantizedCache in the league: workloads, bytes, and where it does not run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch
from transformers import DynamicCache, MistralConfig, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from kvcompress.evaluate import workloads_run
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.serving import model_shape
from kvcompress.evaluate.session import Session
from kvcompress.evaluate.workloads import WORKLOADS, make_workloads
from kvcompress.evaluate.workloads_run import Rival, reference_logits, run_workload
from kvcompress.league import quantized
from kvcompress.league.entries import choose, make_entries, quantized_entries, read_recipes
from kvcompress.league.quantized import QUANTIZED, QuantizedCacheSettings, uncompiled
from kvcompress.league.run import Hall, failures, run_league
from kvcompress.league.verdicts import judge
from kvcompress.league.work import PlaceTask, Worker
from kvcompress.measure.caches import storage_bytes
from kvcompress.profile.source import load_source
from tests.league.conftest import SMALL, no_bar

FP8 = QuantizedCacheSettings(backend="fp8")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def bare(monkeypatch):
    """As if no optional backend were installed."""
    monkeypatch.setattr(quantized, "_version", lambda name: "1.2" if name == "transformers" else "")


# ---- a workload, one row at a time
def both(model, tokenizer, suite):
    """`run_workload` in batches, and one row at a time, on the full cache."""
    batches = run_workload(model, tokenizer, suite)
    rival = Rival("rows", lambda: DynamicCache(config=model.config))
    logits = reference_logits(model, tokenizer, suite)
    return batches, run_workload(model, tokenizer, suite, reference=logits, rival=rival)


@pytest.mark.parametrize("name", WORKLOADS)
def test_one_row_at_a_time_is_the_same_workload(name, tiny_llama, tiny_tokenizer):
    (suite,) = make_workloads(
        tiny_tokenizer,
        Sizes(
            180,
            tiny_llama.config.max_position_embeddings,
            long_words=(1, 1),
            instructions=3,
            **dict(SMALL),
        ),
        names=(name,),
        samples=3,
    )
    batches, rows = both(tiny_llama, tiny_tokenizer, suite)
    # the reference's batch holds pads of shorter documents, a row alone has none
    changed = {"target", "kv_bytes", "kl_nats", "perplexity", "flips"}
    assert rows.model_dump(exclude=changed) == batches.model_dump(exclude=changed)
    whole = [len(d.prompt) + len(d.generated) for d in suite.documents]
    shape = model_shape(tiny_llama)
    twice = 2 * fmean(shape.bf16_kv_bytes(length, 1) for length in whole)  # it is in float32
    assert rows.kv_bytes == round(twice)
    if suite.windows is None:
        assert rows.kl_nats is rows.perplexity is rows.flips is None
        return
    assert rows.kl_nats == pytest.approx((0.0,) * len(suite.windows), abs=1e-9)  # float32 sums
    assert rows.perplexity == pytest.approx(batches.perplexity, rel=1e-5)
    assert rows.flips == batches.flips


def test_prompts_and_windows_are_fed_in_the_parts_of_their_workload(
    tiny_llama, tiny_tokenizer, monkeypatch
):
    """Parts are coded one after the other, and later parts read the codes of earlier ones."""
    parts: list[int | None] = []
    real = Session.prefill

    def told(self, rows, chunk_tokens=None):
        parts.append(chunk_tokens)
        return real(self, rows, chunk_tokens)

    limit = tiny_llama.config.max_position_embeddings
    (suite,) = make_workloads(
        tiny_tokenizer, Sizes(960, limit, **dict(SMALL)), names=("beyond",), samples=1
    )
    reference = reference_logits(tiny_llama, tiny_tokenizer, suite)
    monkeypatch.setattr(Session, "prefill", told)
    config = tiny_llama.config
    rival = Rival("rows", lambda: FP8.make(config))
    run_workload(tiny_llama, tiny_tokenizer, suite, reference=reference, rival=rival)
    assert suite.windows is not None
    assert parts == [limit // 2] * (1 + len(suite.windows))


def test_right_answers_are_counted_as_in_batches(demo_model_dir):
    model, tokenizer = load_source(str(demo_model_dir), "cpu")
    (suite,) = make_workloads(tokenizer, Sizes(400, 1024), names=("instructions",), samples=2)
    batches, rows = both(model, tokenizer, suite)
    assert 0 < batches.score
    assert (rows.hits, rows.output_tokens) == (batches.hits, batches.output_tokens)


def test_asking_leaves_the_cache_for_the_next_question(tiny_llama):
    """What is fed to a twin never reaches the cache that it came from."""
    ids = list(range(30, 70))
    tokens = torch.tensor([ids[:9]])

    def read() -> Session:
        session = Session(tiny_llama, FP8.make(tiny_llama.config), 0)
        session.prefill([ids])
        return session

    fresh = read().feed(tokens)
    asked = read()
    before = storage_bytes(asked.cache.layers)
    assert torch.equal(asked.twin().feed(tokens), fresh)
    assert storage_bytes(asked.cache.layers) == before and asked.cache.get_seq_length() == 40
    assert torch.equal(asked.feed(tokens), fresh)


# ---- bytes
class ByteLayer(QuantizedLayer):
    """Codes of a byte and a 16-bit scale per vector, held as hqq holds them."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), {
            "scale": scale.bfloat16(),
            "dtype": tensor.dtype,
        }

    def _dequantize(self, q_tensor):
        codes, meta = q_tensor
        return codes.to(meta["dtype"]) * meta["scale"].to(meta["dtype"])


class Pair(torch.Tensor):
    """A tensor that is made of two others, as quanto's are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("counting bytes computes nothing")


def test_codes_constants_and_residual_are_counted():
    """Two layers, 3 heads of 8: 100 tokens coded, then 10 that wait, then 28 more in codes."""
    cache = DynamicCache()
    cache.layers = [ByteLayer(), ByteLayer()]

    def feed(tokens: int) -> int:
        for layer in range(2):
            part = torch.randn(1, 3, tokens, 8)
            cache.update(part, part.clone(), layer)
        return storage_bytes(cache.layers)

    coded, plain = 2 * 2 * 3 * (8 + 2), 2 * 2 * 3 * 8 * 4
    assert feed(100) == 100 * coded
    assert feed(10) == 100 * coded + 10 * plain
    assert feed(117) == 100 * coded + 127 * plain
    assert feed(1) == 228 * coded


def test_fp8_holds_a_byte_per_element_and_four_scales():
    config = MistralConfig(
        num_hidden_layers=2, num_key_value_heads=3, head_dim=8, sliding_window=None
    )
    cache = FP8.make(config)
    for _ in range(2):
        for layer in range(2):
            cache.update(torch.randn(1, 3, 5, 8), torch.randn(1, 3, 5, 8), layer)
    assert storage_bytes(cache.layers) == 2 * 2 * (10 * 3 * 8 + 4)


def test_views_count_once_and_whole_and_coded_tensors_by_their_parts():
    cache = DynamicCache()
    (layer,) = cache.layers = [ByteLayer()]
    large = torch.zeros(100, dtype=torch.uint8)
    layer.keys, layer.values = large[:10], large[50:]
    assert storage_bytes(cache.layers) == 100
    layer._quantized_keys = Pair(torch.zeros(7, dtype=torch.uint8), torch.zeros(3))
    assert storage_bytes(cache.layers) == 100 + 7 + 12


# ---- what runs here
def test_a_missing_package_names_the_extra(bare):
    reasons = {name: settings.refusal(MistralConfig()) for name, settings in QUANTIZED.items()}
    extra = "pip install 'kvcompress[quantized-cache]'"
    assert reasons["hf-hqq-int4"] == f"needs hqq: {extra}"
    assert reasons["hf-quanto-int2"] == f"needs optimum-quanto: {extra}"


def test_a_model_that_it_cannot_hold_is_refused_with_its_reason(bare):
    windows = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert FP8.refusal(windows).startswith("transformers 1.2: `QuantizedCache` is only supported")
    assert FP8.refusal(MistralConfig(num_hidden_layers=2, sliding_window=None)) == ""


def test_settings_reach_the_cache(monkeypatch):
    given = []
    monkeypatch.setattr(QuantizedCache, "__init__", lambda self, *a, **k: given.append((a, k)))
    config = MistralConfig()
    for settings in QUANTIZED.values():
        settings.make(config)
    axes = {"hqq": 1, "quanto": 0}
    assert given == [
        ((backend, config), {"nbits": bits, "axis_key": axes[backend], "axis_value": axes[backend]})
        for backend, bits in (("hqq", 8), ("hqq", 4), ("hqq", 2), ("quanto", 4), ("quanto", 2))
    ] + [(("fp8", config), {})]


def test_outcomes_are_kept_by_settings_and_package(monkeypatch):
    told = {settings.told() for settings in QUANTIZED.values()}
    assert len(told) == len(QUANTIZED)
    monkeypatch.setattr(quantized, "_version", lambda name: "another")
    assert told.isdisjoint(settings.told() for settings in QUANTIZED.values())


def test_names_are_those_of_no_recipe_and_can_be_chosen(bare):
    recipes = read_recipes(RECIPES)
    assert {recipe.name for recipe in recipes}.isdisjoint(QUANTIZED)
    entries, _ = make_entries(recipes, "int8", quantized_entries())
    roles = [entry.role for entry in entries]
    assert sorted(roles, key=roles.index) == roles  # roles stay together
    chosen = choose(entries, ["hf-fp8", "hf-hqq-int4"])
    assert [(e.name, e.role) for e in chosen] == [
        ("full cache", "reference"),
        ("hf-hqq-int4", "quantization"),
        ("hf-fp8", "quantization"),
    ]
    assert chosen[1].description == (
        "transformers' QuantizedCache, hqq, 4 bits in groups of 64, up to 127 decoded tokens in "
        "16 bits"
    )


# ---- quanto without its compiler
def test_quanto_unpacks_without_compiling_inside_the_block_alone(monkeypatch):
    def compiles(packed, bits):
        raise RuntimeError("this would compile for minutes")

    packages = {name: ModuleType(name) for name in ("optimum", "optimum.quanto")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    packages["optimum"].quanto = packages["optimum.quanto"]  # type: ignore[attr-defined]
    settings, cpu = QUANTIZED["hf-quanto-int2"], torch.device("cpu")
    with torch.library._scoped_library("quanto", "FRAGMENT") as own:
        own.define("unpack(Tensor self, int bits) -> Tensor")
        own.impl("unpack", compiles, "CPU")
        packed = torch.tensor([[0b11100100], [0b00011011]], dtype=torch.uint8)
        with uncompiled(settings, cpu):
            two = torch.ops.quanto.unpack(packed, 2)
            four = torch.ops.quanto.unpack(packed, 4)
        assert two.flatten().tolist() == [0, 3, 1, 2, 2, 1, 3, 0]
        assert four.flatten().tolist() == [0b0100, 0b1011, 0b1110, 0b0001]
        with pytest.raises(RuntimeError, match="would compile"):
            torch.ops.quanto.unpack(packed, 2)
        with (
            uncompiled(FP8, cpu),
            pytest.raises(RuntimeError, match="would compile"),
        ):
            torch.ops.quanto.unpack(packed, 2)


# ---- the league
def test_it_runs_at_its_own_bytes_and_what_is_missing_is_told(
    setup, recipes, bare, monkeypatch, benchmark
):
    runs: list[str] = []
    real = workloads_run.run_workload

    def counted(*given, rival=None, **named):
        runs.extend([] if rival is None else [rival.target])
        return real(*given, rival=rival, **named)

    monkeypatch.setattr(workloads_run, "run_workload", counted)

    def league():
        entries, skipped = make_entries(read_recipes(recipes), "int8", quantized_entries())
        hall = Hall(setup, entries, skipped, (0.5,), "int8", "a machine")
        return run_league(hall, 1, bar=no_bar)

    first = league()
    assert failures(first) == [] and len(runs) == 1
    assert [(c.entry, c.point) for c in first.cells] == [
        ("full cache", None),
        ("sink-recent", 0.5),
        ("hf-fp8", None),
        ("h2o", 0.5),
    ]
    done = first.cells[2].outcome
    assert done is not None and done.kl_nats is not None and len(done.hits) == 2
    layers, heads, width = 2, 2, 16
    shape = Worker(setup).shape
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (layers, heads, width)
    suite, _ = Worker(setup).suite("hidden")
    lengths = [len(document.prompt) for document in suite.documents]
    assert done.kv_bytes == round(
        fmean(2 * layers * (length * heads * width + 4) for length in lengths)
    )
    assert 0 < max(done.kl_nats) < 0.1  # coded, and not badly
    assert [each.name for each in first.skipped] == [n for n in QUANTIZED if n != "hf-fp8"]
    page = benchmark("league_page").render(first, judge(first), "league")
    assert "- hf-hqq-int8: needs hqq: pip install 'kvcompress[quantized-cache]'" in page
    assert league().cells == first.cells and len(runs) == 1


def test_plans_on_disk_are_found_as_before(setup, recipes):
    """Entries with a recipe have the names of plans that they had before these were there."""
    entries, _ = make_entries(read_recipes(recipes))
    task = PlaceTask(entries[1], 0.5, 150)
    other = replace(task, entry=task.entry.model_copy(update={"quantized": FP8}))
    worker = Worker(setup)
    assert worker._place_name(task) == worker._place_name(other)
