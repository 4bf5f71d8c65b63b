import io

from rich.console import Console

from kvcompress.evaluate.report import QualityReport, Recall, TextQuality
from kvcompress.evaluate.table import breakdown, comparison

RECALL = Recall(
    samples=24,
    exact=0.9583,
    interval=(0.87, 1.0),
    by_depth=(1.0, None, 0.5, 1.0, 1.0),
    by_span={"1": 1.0, "9-16": 0.75},
    by_task={"recall": 0.9583},
    output_tokens=8.0,
)
REPORT = QualityReport(
    name="int8",
    target="by hand",
    context_tokens=960,
    seed=0,
    visible=RECALL,
    hidden=None,
    text=TextQuality(tokens=512, perplexity=12.345, kl_nats=0.00123, flips=0.02),
    kv_bytes=2_232_976,
    kv_bytes_accounted=2_232_976,
    kv_bytes_bf16=3_932_160,
    weights_bytes=8 * 2**20,
)


def printed(table):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def row_of(table):
    return next(line for line in printed(table).splitlines() if line.startswith(" int8")).split()


def test_a_row_shows_the_measured_figures_and_drops_empty_columns():
    table = comparison([REPORT])
    assert row_of(table) == "int8 2181 0.568 95.8 87-100 0.0012 12.35 8.0 MiB".split()
    headings = [column.header for column in table.columns]
    assert headings == ["cache", "KV KiB", "of bf16", "visible", "95 %", "KL", "ppl", "weights"]
    assert "512 tokens" in table.caption and "24 answers" in table.caption


def test_the_table_fits_a_terminal_of_100_columns():
    more = {"name": "byte plan 1/4 (bundle)", "hidden": RECALL, "kl_predicted": 0.0234}
    long = REPORT.model_copy(update=more)
    lines = printed(comparison([long])).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100


def test_the_predicted_loss_stands_beside_the_measured_one():
    plan = REPORT.model_copy(update={"name": "plan", "kl_predicted": 0.002})
    lines = comparison([REPORT, plan]).caption.splitlines()
    assert lines[-1] == "KL that the plans' profiles predicted: plan 0.0020."
    assert "predicted:" not in comparison([REPORT]).caption


def test_the_breakdown_marks_a_fifth_without_notes():
    expected = "int8 100.0 - 50.0 100.0 100.0 100.0 75.0 95.8"
    assert row_of(breakdown([REPORT])) == expected.split()


def test_a_report_survives_json():
    assert QualityReport.model_validate_json(REPORT.model_dump_json()) == REPORT
