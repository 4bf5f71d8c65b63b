"""`kvcompress bench`: its rows, its refusals, its table."""

from __future__ import annotations

import io
import json

import pytest
import torch

from kvcompress.bench.bandwidth import Buffers
from kvcompress.bench.cell import Rounds, run_cell
from kvcompress.bench.entries import Entry, Size, dtype_words, step_weight_bytes
from kvcompress.bench.run import bench, fill_of
from kvcompress.bench.table import result_table
from kvcompress.cli import app
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.compare import Row as PlanRow
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.rules import Recall
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import CACHE

ROUNDS = Rounds(2, 1, buffer_bytes=2**20)


def size(context: int = 64, fill: str = "synthetic") -> Size:
    return Size(context, 1, 0, 1, fill_of(fill))


@pytest.fixture(scope="module")
def shape(tiny_llama):
    return shape_of(tiny_llama.config, tiny_llama.dtype)


def run(model, rows, peers=("dynamic", "static"), where=None):
    return bench(
        model, rows, peers, where or size(), ROUNDS, model_name="tiny", malloc="default",
        command="kvcompress bench tiny",
    )  # fmt: skip


@pytest.mark.parametrize("fill", ["synthetic", "prompt"])
def test_rows_bytes_and_floor(tiny_llama, shape, fill):
    plan = uniform(shape, HeadPlan(full=True))
    result = run(tiny_llama, [PlanRow("ours", plan, None)], where=size(64, fill))
    (cell,) = result.cells
    kinds = {row.name: row.kind for row in cell.rows}
    assert kinds == {
        "DynamicCache": "peer",
        "StaticCache": "peer",
        "32 tokens of cache": "limit",
        "ours": "ours",
    }
    element = tiny_llama.dtype.itemsize
    full = 2 * shape.layers * shape.kv_heads * shape.head_dim * element
    assert cell.row("DynamicCache").kv_bytes == full * 64
    counters = 8 * shape.layers
    assert cell.row("StaticCache").kv_bytes == full * (64 + ROUNDS.room_tokens) + counters
    assert cell.row("32 tokens of cache").kv_bytes == full * 32
    for row in cell.rows:
        assert row.fill == fill and row.weights == dtype_words(tiny_llama)
        assert len(row.timing.wall_ms) == 2 and min(row.timing.wall_ms) > 0
        assert row.read_bytes == row.kv_bytes + step_weight_bytes(tiny_llama)
        assert cell.floor_ms(row) == pytest.approx(
            row.read_bytes / cell.bandwidths[0].read_gb_s / 1e6
        )


def test_a_step_reads_all_weights_but_an_embedding_of_its_own(tiny_llama):
    parameters = {p.data_ptr(): p.nbytes for p in tiny_llama.parameters()}
    buffers = {b.data_ptr(): b.nbytes for b in tiny_llama.buffers()}
    embedding = tiny_llama.get_input_embeddings().weight
    assert embedding.data_ptr() != tiny_llama.get_output_embeddings().weight.data_ptr()
    every = sum({**parameters, **buffers}.values())
    assert step_weight_bytes(tiny_llama) == every - embedding.nbytes


def test_the_model_serves_no_plan_while_its_rivals_are_timed(tiny_llama, shape):
    """A rival that ran through our attention would not be the rival."""
    seen: dict[str, object] = {}
    plan = uniform(shape, HeadPlan(full=True))

    def look(module, args, kwargs) -> None:
        seen[type(kwargs[CACHE]).__name__] = attached(module)

    hook = tiny_llama.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run(tiny_llama, [PlanRow("ours", plan, None)])
    finally:
        hook.remove()
    assert seen["DynamicCache"] is None and seen["StaticCache"] is None
    assert seen["CompressedCache"] == (plan, None)


def test_what_cannot_be_timed_is_refused_or_listed(tiny_llama, shape):
    plan = uniform(shape, HeadPlan(full=True))
    rows = [PlanRow("ours", plan, None)]
    with pytest.raises(ValueError, match="unknown peers mamba: choose from dynamic, static"):
        run(tiny_llama, rows, ("mamba",))
    with pytest.raises(ValueError, match=r"positions of the model: use a context of at most 249"):
        run(tiny_llama, rows, where=size(250))
    with pytest.raises(ValueError, match="--fill real: choose synthetic or prompt"):
        fill_of("real")
    full = HeadPlan(full=True)
    recall = uniform(shape, full, recall=Recall(resident=Budget(tokens=64)))
    with pytest.raises(KVCompressError, match="tier: use --fill prompt"):
        run(tiny_llama, [PlanRow("tier", recall, None)])


def test_a_rival_that_fails_is_listed_and_ours_is_not_forgiven():
    def fails():
        raise RuntimeError("no such kernel")

    rival, large = Entry("rival", "peer", fails), Entry("large", "ours", fails, needs_bytes=2**60)
    with pytest.raises(ValueError, match="nothing to time"):
        run_cell("c", [], Rounds(0, 1, buffer_bytes=2**20))
    cell = run_cell("c", [rival, large], ROUNDS)
    reasons = {each.name: each.reason for each in cell.missing}
    assert reasons["rival"] == "RuntimeError: no such kernel"
    assert reasons["large"].startswith("needs 1073741824.0 GiB")
    with pytest.raises(RuntimeError, match="no such kernel"):
        run_cell("c", [Entry("ours", "ours", fails)], ROUNDS)


def test_bandwidth_passes_over_every_byte():
    buffers = Buffers(2**20)
    assert buffers.read_bytes == buffers.copied_bytes == 2**20
    read, copy = buffers.cases(1)
    assert (read.name, copy.name) == ("read, 1 threads", "copy, 1 threads")
    assert read.measure(3).steps == 3
    copy.measure(1)
    assert torch.equal(buffers._target, buffers._source[0])


def test_the_table_says_what_was_measured(tiny_llama, shape):
    from rich.console import Console

    plan = uniform(shape, HeadPlan(full=True))
    result = run(tiny_llama, [PlanRow("ours", plan, None)])
    screen = io.StringIO()
    Console(width=160, file=screen).print(result_table(result))
    text = screen.getvalue()
    (cell,) = result.cells
    ours, first = cell.row("ours"), cell.row("DynamicCache")
    line = next(x for x in text.splitlines() if x.strip().startswith("ours"))
    assert f"{ours.timing.wall.median:.2f} " in line
    pairs = zip(ours.timing.wall_ms, first.timing.wall_ms, strict=True)
    assert f"{sum(b / a for a, b in pairs) / 2:.2f}x" in line  # the median of two is their mean
    assert "DynamicCache =" in text and "32 tokens of cache (limit)" in text
    assert "Speed says nothing of quality" in text


def test_the_command(tiny_model_dir, capfd):
    with pytest.raises(SystemExit) as stop:
        app.main(
            ["bench", str(tiny_model_dir), "--context", "48", "--rounds", "1", "--steps", "1",
             "--device", "cpu", "--threads", "1", "--malloc", "default", "--json"]
        )  # fmt: skip
    out, err = capfd.readouterr()
    assert stop.value.code == 0, err
    found = json.loads(out)
    assert [row["name"] for row in found["cells"][0]["rows"]] == [
        "DynamicCache", "StaticCache", "32 tokens of cache", "int8, every token",
    ]  # fmt: skip
    assert found["conditions"]["model"] == "model"  # no folders of an absolute path
    with pytest.raises(SystemExit) as stop:
        app.main(["bench", str(tiny_model_dir), "--malloc", "odd"])
    assert stop.value.code == 2
    assert "--malloc odd: choose tuned or default" in capfd.readouterr().err
