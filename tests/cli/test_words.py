"""What commands print: every figure with its unit, whole at any width of a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from kvcompress.bundle.inspect import describe
from kvcompress.bundle.verify import VerifyReport
from kvcompress.bundle.write import ExportReport
from kvcompress.cli import common, words
from kvcompress.plan import Budget, HeadPlan, Plan
from kvcompress.profile import report
from kvcompress.profile.solve import solve
from kvcompress.runtime.complete import Completion, pays_from
from tests.profile.test_solve import PROFILE, bytes_policy

PLAN = solve(PROFILE, bytes_policy(keep_ratio=0.2))
DIGEST = "0123456789abcdef" * 4
EXPORTED = ExportReport(
    path="runs/bundle",
    digest=DIGEST,
    weights_format="nf4",
    weights_bytes=3 * 2**20,
    base_weights_bytes=8 * 2**20,
    bundle_bytes=4 * 2**20,
    kept=tuple(f"model.layers.{i}.mlp" for i in range(5)),
    planned_bytes=3 * 2**20,
    tensor_bytes=3 * 2**20 + 1024,
    reload_error=0.0,
    lossless_error=0.0077,
)
VERIFIED = VerifyReport("runs/bundle", DIGEST, 12, None, 0.0077, 0.071, 0.0079, 0.05)


def shown(value, width):
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(common.fitting(value))
    return out.getvalue()


def inspected():
    return words.inspected(describe("plan.json", PLAN, 1024, 1, None), ["a word: its meaning"])


WIDE = Table("cache", "KiB", "perplexity", title="all", caption="KiB: of the cache.")
for column in WIDE.columns:
    column.no_wrap = True
WIDE.add_row("a plan of a name that is long enough to fill the line", "123.4", "9.03")
PRINTED = {
    "exported": lambda: words.exported(EXPORTED),
    "verified": lambda: words.verified(VERIFIED),
    "inspected": inspected,
    "planned": lambda: report.table(PLAN, 1024, 1),
    "compared": lambda: WIDE,
    "found": lambda: words.table_of([{"a": "x " * 60, "b": None, "c": 3}], "a", "b", "c"),
}


@pytest.mark.parametrize("width", [80, 120, 160])
@pytest.mark.parametrize("kind", PRINTED)
def test_nothing_is_cut_off_and_no_field_is_raw(kind, width):
    text = shown(PRINTED[kind](), width)
    assert max(map(len, text.splitlines())) <= width
    cut = text.replace(f"sha256 {DIGEST[:16]}…", "")
    assert "…" not in cut
    assert not any(raw in text for raw in ("[]", "None", "_bytes", "lossless error", "planned -"))


def test_an_export_says_what_each_figure_is():
    text = " ".join(shown(words.exported(EXPORTED), 160).split())
    for part in (
        "bundle runs/bundle, 4.00 MiB in all",
        "weights 3.00 MiB of files in nf4; the model in 16 bits takes 8.00 MiB",
        "weights planned 3.00 MiB were planned, the tensors take 3.00 MiB",
        "left in 16 bits 5 linear layers",
        "model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp and 2 more",
        "reload check loaded again, logits differ by 0 % from those before the save",
        "a compressed cache that keeps everything: logits differ by 0.77 % from transformers' own",
    ):
        assert part in text, text


def test_a_table_too_wide_is_printed_row_by_row():
    text = shown(WIDE, 60)
    assert text.splitlines() == [
        "all",
        "a plan of a name that is long enough to fill the line",
        "    KiB 123.4, perplexity 9.03".ljust(60),
        "KiB: of the cache.",
    ]
    assert "┃" in shown(WIDE, 160)


def test_the_glossary_explains_the_words_that_occur():
    text = report.glossary(["full int4", "special+punct+frequent 0.3+local 64t k8v4"], 4, 16)
    for word in ("full", "special", "punct", "frequent", "local", "int4", "k8v4"):
        assert f"{word}: " in text
    assert "int8: " not in text and "first 4 and the newest 16 tokens, uncoded." in text
    assert "sink+recent: " in report.glossary(["sink+recent"], 1, 2)
    heads = [HeadPlan(), HeadPlan(full=True), HeadPlan(local=Budget(ratio=0.5), k_dtype="model")]
    for head in heads:
        first = report.describe(head).split()[0].split("+")[0]
        assert f"{first}" in report.glossary([report.describe(head)], 4, 16)


@pytest.mark.parametrize("plan", [PLAN, solve(PROFILE, bytes_policy(keep_ratio=0.9))])
def test_the_length_from_which_a_plan_pays_is_where_it_does(plan):
    from kvcompress.accounting import kv_bytes

    def saves(tokens):
        return kv_bytes(plan, tokens, 1) < plan.model.bf16_kv_bytes(tokens, 1)

    first = pays_from(plan)
    assert first is not None and first > 1
    assert not saves(first - 1) and saves(first)
    assert all(saves(n) for n in range(2 * first, 300)) and not any(map(saves, range(1, 16)))


def test_a_plan_that_never_pays():
    full = HeadPlan(full=True, k_dtype="model", v_dtype="model")
    whole = PLAN.model_copy(update={"heads": ((full, full),) * 2, "sink_tokens": 4})
    assert pays_from(Plan.model_validate(whole.model_dump())) is None


@pytest.mark.parametrize(
    ("held", "pays", "text"),
    [
        (2048, 27, "KV cache 2.00 KiB, 50.0 % of the 4.00 KiB that 16 bits take"),
        (4200, 27, "102.5 % of the 4.00 KiB that 16 bits take"),
        (4100, None, "saves nothing at any length"),
    ],
)
def test_a_completion_says_why_a_short_prompt_saves_nothing(held, pays, text):
    line = words.completed(Completion("x", 12, 8, held, 4096, pays))
    assert line.startswith("12 tokens of prompt and 8 new ones; KV cache ")
    assert text in line
    assert ("saves bytes from about 27 tokens on" in line) == (held > 4096 and pays is not None)
