"""The speed benchmarks run, their files hold what they say, and the page shows its results."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompress.bench.result import Result

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "speed"
SMALL = ["--scale", "tiny", "--rounds", "2", "--steps", "1", "--buffer", "1"]
WORKER = """
import sys
sys.path.insert(0, {benchmarks!r})
from speed.protocol import Replies, serve
replies = Replies()
print("a library talks")
if sys.argv[1:] == ["fail"]:
    sys.exit("no such weights")
serve(replies, {{"kv_bytes": 7}}, lambda n: {{"steps": n, "wall_s": 2.0 * n, "cpu_s": 1.0}})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


def measured(benchmark, folder: Path, name: str, *arguments: str) -> Result:
    """What a script measures at a tiny size, read back from its file."""
    script = benchmark(name)
    args = script.RUN.options().parse_args([*SMALL, "--results", str(folder), *arguments])
    result = script.RUN.measure(args)
    assert Result.load(folder / f"{name}.json") == result
    assert script.report(result)
    return result


@pytest.fixture(scope="module")
def decode(benchmark, folder) -> Result:
    return measured(benchmark, folder, "decode", "--cells", "96x2", "--threads", "1", "--no-rivals")


@pytest.fixture(scope="module")
def others(benchmark, folder) -> dict[str, Result]:
    return {
        "kernel": measured(
            benchmark, folder, "kernel", "--cells", "64x1", "--threads", "1"
        ),
        "prefill": measured(benchmark, folder, "prefill", "--cells", "48x1", "--no-rivals"),
        "fixed_memory": measured(
            benchmark, folder, "fixed_memory", "--context", "256", "--memory", "1", "--prompts",
            "1", "--most-rows", "20", "--no-rivals",
        ),
        "scaling": measured(
            benchmark, folder, "scaling", "--contexts", "48,64,96", "--batches", "2",
            "--batch-context", "48",
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def host(benchmark, folder) -> dict:
    script = benchmark("host_overhead")
    return script.measure(script.options().parse_args([*SMALL, "--results", str(folder)]))


def test_the_parts_of_a_step_are_the_step(benchmark, folder, host):
    script = benchmark("host_overhead")
    assert json.loads((folder / "host_overhead.json").read_text("utf-8")) == host
    without = [row for row in host["rows"] if row["weights"] == "float32"]
    assert [row["layers"] for row in without] == [2]
    for row in host["rows"]:
        assert set(row["ms"]) == set(script.PARTS) and min(row["ms"].values()) > 0
        assert sum(row["ms"].values()) == pytest.approx(row["step_ms"], rel=0.2)


def test_time_inside_another_part_counts_once(benchmark, monkeypatch):
    script = benchmark("host_overhead")
    now = iter((0.0, 1.0, 4.0, 10.0))  # outer begins, inner begins and ends, outer ends
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = script.Clock()
    inner = clock.around("attention kernel", lambda: None)
    assert clock.step(inner) == {
        "products with weights": 0.0, "attention kernel": 3000.0, "kvcompress around it": 0.0,
        "transformers": 7000.0,
    }  # fmt: skip


def test_decode_times_every_recipe_beside_its_bytes(benchmark, decode):
    (cell,) = decode.cells
    assert cell.name == "96 tokens, batch 2"
    own = [row for row in cell.rows if row.kind == "ours"]
    recipes = {row.name.partition(",")[0] for row in own}
    assert recipes == {
        *(f"{kind} {keep} %" for kind in ("int8", "k8v4", "int4", "fp8", "uncoded")
          for keep in (100, 20)),
        "planned 1/8",
    }  # fmt: skip
    config = benchmark("speed.model").config("tiny")
    full = 2 * 2 * 96 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert cell.row("DynamicCache float32").kv_bytes == full
    assert cell.row("DynamicCache bfloat16").kv_bytes == full // 2
    assert cell.row("DynamicCache bfloat16").kind == "artefact"
    assert cell.row("int8 20 %, float32").kv_bytes < cell.row("int8 100 %, float32").kv_bytes < full
    assert {row.quality for row in own} == recipes
    assert "OffloadedCache" in {each.name for each in cell.missing}
    cells = benchmark("performance_page").plain(RESULTS, "quality")["cells"]
    assert recipes <= set(cells)


def test_a_measured_cell_is_not_measured_again(benchmark, folder, decode):
    again = measured(
        benchmark, folder, "decode", "--cells", "96x2", "--threads", "1", "--no-rivals"
    )
    assert again.cells == decode.cells


def test_a_file_names_every_command_that_measured_a_cell(benchmark, tmp_path, decode, monkeypatch):
    output, options = benchmark("speed.harness"), benchmark("decode").RUN.options()
    commands = ["--cells 64x1", "--cells 32x1 --only 'int8 '", "--cells 64x1"]
    for command, name in zip(commands, ("64", "32", "64"), strict=True):
        monkeypatch.setattr(output.sys, "argv", ["decode.py", *output.shlex.split(command)])
        args = options.parse_args([*SMALL, "--results", str(tmp_path)])
        book = output.ResultBook("decode", args, ["32", "64"])
        book.get(name, lambda name=name: decode.cells[0].model_copy(update={"name": name}))
    written = Result.load(tmp_path / "decode.json")
    assert [cell.name for cell in written.cells] == ["32", "64"]
    assert written.command.split("; ") == [f"python benchmarks/decode.py {c}" for c in commands[:2]]


def test_claims_compare_within_one_cell(benchmark, decode):
    claims = benchmark("speed.claims")
    (cell,) = decode.cells
    mine, other = cell.row("int8 100 %, float32"), cell.row("StaticCache float32")
    pairs = zip(mine.timing.wall_ms, other.timing.wall_ms, strict=True)
    ratio = sum(b / a for a, b in pairs) / 2  # the median of two
    claim = claims.Claim(cell.name, "x", (mine.name, "no such row"), (other.name,))
    assert claim.answer(decode).startswith(f"{ratio:.2f}x [")
    assert claims.Claim("32 tokens", "x", (mine.name,)).answer(decode) == "not measured"
    missing = claims.Claim(cell.name, "x", ("gone",), (other.name,)).answer(decode)
    assert missing == "not measured: no row gone"
    floor = claims.Claim(cell.name, "x", (mine.name,)).answer(decode)
    share = 100 * cell.floor_ms(mine) / mine.timing.wall.median
    assert floor.startswith(f"{share:.0f} % of the floor")


def test_kernels_read_what_their_caches_hold(others):
    found = others["kernel"]
    cell, linears = found.cell("64 tokens, batch 1"), found.cell("linear layers")
    for row in cell.rows:
        assert row.read_bytes == row.kv_bytes > 0 and row.weights_bytes == 0
    whole = cell.row("sdpa float32, queries of a group as rows, 1 thread")
    assert whole.kv_bytes == 2 * 64 * 2 * 2 * 32 * 4  # K and V, tokens, layers, heads, channels
    assert cell.row("sdpa bfloat16, enable_gqa, 1 thread").kind == "artefact"
    half = linears.row("linears bfloat16, 1 thread").read_bytes
    assert linears.row("linears float32, 1 thread").read_bytes == pytest.approx(2 * half, rel=1e-3)


def test_prompts_are_read_into_each_cache(others):
    (cell,) = others["prefill"].cells
    assert {row.fill for row in cell.rows} == {"prompt"}
    assert all(row.read_bytes is None and row.timing.steps == 1 for row in cell.rows)
    held = cell.row("int8 20 %, float32").kv_bytes
    assert cell.row("int8 20 %, every query votes, float32").kv_bytes == held
    assert abs(cell.row("int8 20 %, sums estimated, float32").kv_bytes - held) < 0.01 * held


def test_prompts_are_scored_as_their_rows_say(benchmark, monkeypatch):
    script, models = benchmark("prefill"), benchmark("speed.model").Models("tiny")
    plans = []
    monkeypatch.setattr(script, "compressed_holder", lambda model, plan: plans.append(plan))
    made = script.entries(models, benchmark("speed.cases").Size(48, 1, 1, 1, "prompt"))
    own = [entry.name for entry in made if entry.kind == "ours"]
    voters = {n: (p.score_rows, p.score_stride) for n, p in zip(own, plans, strict=True)}
    assert voters["int8 20 %, float32"] == (64, None)
    assert {name: voters[name] for name in script.VOTERS} == script.VOTERS


def test_every_method_takes_the_largest_batch_that_fits(benchmark, others):
    script = benchmark("fixed_memory")
    largest, equal = others["fixed_memory"].cells
    models = benchmark("speed.model").Models("tiny")
    methods = {m.name: m for m in script.all_methods(models, 256)[0]}
    for row in largest.rows:
        method = methods[row.name]
        assert method.row_bytes(row.batch) <= 2**20
        assert row.batch == 20 or method.row_bytes(row.batch + 1) > 2**20
        assert row.kv_bytes <= 2**20 + 64  # counters of how much of a static layer is used
        assert row.prompt is not None and len(row.prompt.wall_ms) == 1
    assert largest.row(script.STATIC).batch == 8  # rows of 128 KiB in a MiB
    assert {row.batch for row in equal.rows} == {largest.row(script.STATIC).batch}


def test_tokens_per_second_with_prompts(benchmark, others):
    """Worked out by hand: 4 rows, prompts of 100 ms each, steps of 10 ms."""
    script = benchmark("fixed_memory")
    row = others["fixed_memory"].cells[0].rows[0]
    steps = row.timing.model_copy(update={"wall_ms": (10.0, 10.0)})
    prompt = row.timing.model_copy(update={"wall_ms": (100.0,)})
    made = row.model_copy(update={"batch": 4, "timing": steps, "prompt": prompt})
    assert script.decoding(made).median == pytest.approx(400.0)
    seconds = 4 * 0.1 + script.NEW_TOKENS * 0.01
    assert script.served(made).median == pytest.approx(4 * script.NEW_TOKENS / seconds)


def test_a_line_is_extrapolated_only_where_it_fits(benchmark, others):
    script = benchmark("scaling")
    rows = script.series(others["scaling"])["int8 100 %, float32"]
    assert [row.context_tokens for row in rows] == [48, 64, 96]

    def with_medians(*medians: float):
        pairs = zip(rows, medians, strict=True)
        return [
            row.model_copy(update={"timing": row.timing.model_copy(update={"wall_ms": (x, x)})})
            for row, x in pairs
        ]

    line = script.line_of(with_medians(5.8, 7.4, 10.6))  # 1 + 0.1 per token
    assert line.fits and line.at(1000) == pytest.approx(101.0)
    assert not script.line_of(with_medians(10.0, 10.0, 4.0)).fits
    assert script.line_of(rows[:2]) is None
    table = script.context_table(others["scaling"])
    assert "extrapolated" in table


def test_a_worker_takes_its_turn_over_a_pipe(benchmark, tmp_path):
    protocol = benchmark("speed.protocol")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS)), encoding="utf-8")
    worker = protocol.Worker([sys.executable, str(script)], os.environ)
    assert worker.facts == {"kv_bytes": 7}
    assert worker.window(3) == {"steps": 3, "wall_s": 6.0, "cpu_s": 1.0}
    assert worker.window(1)["wall_s"] == 2.0
    worker.close()
    with pytest.raises(protocol.WorkerError, match="ended with 1: no such weights"):
        protocol.Worker([sys.executable, str(script), "fail"], os.environ)
    with pytest.raises(protocol.WorkerError, match="No such file"):
        protocol.Worker([str(tmp_path / "python")], os.environ)


def test_a_rival_in_a_process_of_its_own_holds_the_same_bytes(benchmark, decode):
    """DynamicCache with the allocator's own thresholds: as timed here, in another process."""
    workers, models = benchmark("speed.workers"), benchmark("speed.model").Models("tiny")
    size = benchmark("speed.cases").Size(96, 2, 8, 1)
    ready = workers.untuned_entry(models, size).make()
    try:
        window = ready.case.measure(2)
    finally:
        ready.close()
    row = decode.cells[0].row("DynamicCache float32")
    assert ready.facts.process == "own" and window.steps == 2 and window.wall_s > 0
    assert (ready.facts.kv_bytes, ready.facts.read_bytes) == (row.kv_bytes, row.read_bytes)
    gone = workers.Pythons(vllm=Path("/nowhere/.venv-vllm/bin/python"))
    with pytest.raises(benchmark("speed.protocol").WorkerError, match="there is no .venv-vllm"):
        workers.vllm_entry(models, gone, Path("unused"), size).make()


def test_the_planned_shape_is_that_of_the_profile(benchmark):
    """16 heads of the shipped model over 128: as many of each policy, eight times."""
    planned = benchmark("speed.plans")
    plan = planned.Plan.load(planned.PLAN)
    model = benchmark("speed.model")
    with model.torch.device("meta"):
        large = model.LlamaForCausalLM(model.config("full"))
    shape = importlib.import_module("kvcompress.runtime.model.families").shape_of(large.config)
    carried = planned.carried_over(plan, shape)
    labels = [h.label + h.storage for row in carried.heads for h in row]
    plain = {"special": False, "punct": False}
    source = [h.model_copy(update=plain) for row in plan.heads for h in row]
    for label in set(labels):
        assert labels.count(label) == 8 * sum(h.label + h.storage == label for h in source)
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(222e6, rel=0.01)


def test_the_page_shows_the_committed_results(benchmark):
    """Every table and sentence: the page is what the results make, and nothing else."""
    script = benchmark("performance_page")
    found = script.load(RESULTS)
    made = script.render(
        found, script.plain(RESULTS, "quality"), script.plain(RESULTS, "host_overhead")
    )
    assert made == script.PAGE.read_text(encoding="utf-8"), "make performance-page"
    for name in found:
        picture = {"prefill": None}.get(name, f"performance-{name.replace('_', '-')}")
        for ending in ("svg", "png"):
            assert picture is None or (script.FIGURES / f"{picture}.{ending}").is_file()
    for name in set(script.NAMES) - set(found):
        assert f"Not measured yet: `make bench-{name.replace('_', '-')}`" in made


def test_the_page_is_made_of_any_results(benchmark, folder, decode, others, host, tmp_path):
    script = benchmark("performance_page")
    found = script.load(folder)
    assert set(found) == set(script.NAMES)
    quality = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    page = script.render(found, quality, host)
    assert benchmark("host_overhead").report(host) in page
    words = benchmark("speed_quality").words
    table = benchmark("decode").table(decode.cells[0], lambda name: words(quality["cells"], name))
    assert table in page and words(quality["cells"], "int8 20 %") in table
    assert benchmark("scaling").context_table(others["scaling"]) in page
    assert "Not measured yet" not in page
    script.draw(found, tmp_path)
    assert len(list(tmp_path.glob("performance-*.svg"))) == 4
