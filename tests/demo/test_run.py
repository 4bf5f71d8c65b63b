from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.cli.app import main
from kvcompress.demo.run import DemoResult, Settings, demo_suite, run
from kvcompress.errors import KVCompressError
from tests.bundle.helpers import checked_here

NAMES = [
    "reference, full cache",
    "int8",
    "int4",
    "FastGen 0.8 int8",
    "byte plan 1/4 (bundle)",
    "byte plan 1/8",
    "sink+recent int8",
    "random int8",
    "H2O int8",
]
SMALL = Settings(
    context_tokens=700,
    prompts=1,
    tasks=("recall",),
    samples=2,
    windows=1,
    continuation_tokens=20,
    notes_per_document=3,
    max_words=1,
)


@pytest.fixture(scope="module")
def small_model_dir(tmp_path_factory, tiny_tokenizer):
    """Random bf16 weights with room for a context of byte tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=768,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("small") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_whole_job_leaves_a_bundle_and_one_report_per_row(
    tmp_path, small_model_dir, text_file, monkeypatch
):
    monkeypatch.setattr("kvcompress.demo.run.HELD_OUT", text_file)
    told = []
    with checked_here():
        result = run(tmp_path, SMALL, model_dir=small_model_dir, note=told.append)
    assert [report.name for report in result.reports] == NAMES
    assert DemoResult.model_validate_json(Path(result.report).read_text()) == result
    assert (Path(result.bundle) / "kvcompress" / "manifest.json").is_file()
    assert len(told) == 4
    reference, int8, int4, _, quarter, eighth, *rivals = result.reports
    assert reference.kv_bytes == reference.kv_bytes_bf16
    assert int8.kv_bytes == int8.kv_bytes_accounted < reference.kv_bytes
    assert int4.kv_bytes == int4.kv_bytes_accounted < int8.kv_bytes
    assert quarter.kv_ratio <= 0.26 and eighth.kv_ratio <= 0.13
    for rival in rivals:
        assert rival.kv_bytes == rival.kv_bytes_accounted
        assert rival.kv_bytes == pytest.approx(eighth.kv_bytes, rel=0.02)


def test_further_tasks_follow_with_their_own_documents(tiny_tokenizer, text_file, monkeypatch):
    monkeypatch.setattr("kvcompress.demo.run.HELD_OUT", text_file)
    settings = Settings(samples=8, tasks=("recall", "multi_key"), context_tokens=1500, max_words=2)
    samples = demo_suite(tiny_tokenizer, settings).samples
    assert [s.task for s in samples] == ["recall"] * 8 + ["multi_key"] * 2
    first = {s.document for s in samples[:8]}
    assert first.isdisjoint(s.document for s in samples[8:])


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(KVCompressError, match="no demo model there; install kvcompress again"):
        run(tmp_path, model_dir=tmp_path)


@pytest.mark.slow
def test_the_shipped_model_keeps_what_the_readme_says(demo_model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--out", str(tmp_path / "demo"), "--json"])
    result = DemoResult.model_validate_json(capsys.readouterr().out)
    assert [report.name for report in result.reports] == NAMES
    reference, int8, _, _, quarter, eighth, *rivals = result.reports
    assert reference.visible.exact >= 0.9  # 36 questions; the bar itself is taken on more
    assert int8.kv_ratio <= 0.60
    assert int8.visible.exact >= reference.visible.exact - 0.005
    assert quarter.kv_ratio <= 0.25
    assert quarter.visible.exact >= 0.97 * reference.visible.exact
    for rival in rivals:
        assert rival.kv_bytes == pytest.approx(eighth.kv_bytes, rel=0.02)
    assert result.example.answer.strip() == result.example.expected.strip()
