"""Running a bundle: load, verify, inspect and generate, from Python and from the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompress
from kvcompress.accounting import kv_bytes
from kvcompress.bundle.inspect import inspect
from kvcompress.bundle.verify import verify
from kvcompress.checkpoint.compute import stored_dtype
from kvcompress.cli.app import main
from kvcompress.errors import BundleError, PlanError
from kvcompress.plan import Plan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.complete import complete
from kvcompress.runtime.names import cache_of
from tests.bundle.helpers import Exported

SCHEMES = ("bf16", "int8", "nf4")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """(stdout, stderr) of a command that succeeds."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    return out, err


@pytest.mark.parametrize("weights", SCHEMES)
def test_load_generates_with_the_compressed_cache(
    exported: Exported, plan: Plan, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = kvcompress.load(exported(weights)[0])
    batch = tokenizer(["a long first line", "short"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][1, 0] == 0  # padded on the left
    with caplog.at_level(logging.WARNING):
        output = model.generate(
            **batch,
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = cache_of(output)
    assert isinstance(cache, CompressedCache)
    assert cache.plan == plan
    assert output.sequences.shape == (2, batch["input_ids"].shape[1] + 40)
    assert cache.nbytes() < plan.model.bf16_kv_bytes(cache.get_seq_length(), batch=2)
    assert [record.getMessage() for record in caplog.records] == []


def test_loaded_logits_are_those_of_the_exported_model(exported: Exported, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 30)[None]
    source = AutoModelForCausalLM.from_pretrained(model_dir)
    model, _ = kvcompress.load(exported("bf16")[0])
    with torch.inference_mode():
        found, wanted = (m(input_ids=ids, use_cache=False).logits for m in (model, source))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_load_in_another_dtype(exported: Exported) -> None:
    model, _ = kvcompress.load(exported("bf16")[0], dtype=torch.float32)
    assert model.dtype == torch.float32
    assert torch.isfinite(model(input_ids=torch.arange(3, 30)[None]).logits).all()


def test_load_to_compute_in_another_dtype(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported("bf16")[0]
    wide, _ = kvcompress.load(path, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    slow = {"kvcompress.kernels.linear.speed.product_seconds": lambda dtype: dtype.itemsize % 4}
    for word in ("float32", "auto"):
        if word == "auto":
            for place, measured in slow.items():
                monkeypatch.setattr(place, measured)
        model, _ = kvcompress.load(path, dtype=word)
        assert model.dtype == torch.float32 and stored_dtype(model) == torch.bfloat16
        found, wanted = (m(input_ids=ids, use_cache=False).logits for m in (model, wide))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert kvcompress.load(path, dtype="stored")[0].dtype == torch.bfloat16


def test_packed_weights_keep_their_dtype(exported: Exported) -> None:
    path = exported("int8")[0]
    assert kvcompress.load(path, dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(BundleError, match="packed and compute in bfloat16; leave the dtype out"):
        kvcompress.load(path, dtype="float32")


@pytest.mark.parametrize("word", ["float64", "int8", "bf16", "", "nn"])
def test_words_that_are_no_dtype_are_one_line(exported: Exported, word: str) -> None:
    with pytest.raises(BundleError, match=f"dtype '{word}' is none to compute in; choose one of"):
        kvcompress.load(exported("bf16")[0], dtype=word)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", SCHEMES)
def test_verify_measures(exported: Exported, weights: str) -> None:
    path, report = exported(weights)
    checked = verify(path)
    assert checked.digest == report.digest
    assert checked.files == len([file for file in path.rglob("*") if file.is_file()])
    assert checked.reload_error is None
    assert checked.lossless_error <= 2e-2
    # the same, and what the compiled kernels round
    assert checked.generate_error <= 2e-2
    # the plan drops and rounds: it cannot be closer than a cache that keeps everything
    assert checked.lossless_error <= checked.plan_error < 1


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("another cache", "generate used another cache than the plan's"),
        ("zeroed", "logits of generate with a cache that keeps everything differ by"),
        ("NaN", "the model gives logits that are not finite"),
    ],
)
def test_verify_goes_the_way_of_users(
    exported: Exported, damage: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards by hand are right, and generate with the plan attached is not."""
    from transformers import DynamicCache

    from kvcompress.runtime.hf import generate

    def broken(model: Any, *args: Any, **kwargs: Any) -> Any:
        output = type(model).generate(model, *args, **kwargs)
        if damage == "another cache":
            output.past_key_values = DynamicCache()
        else:
            factor = float("nan") if damage == "NaN" else 0
            output.logits = tuple(step * factor for step in output.logits)
        return output

    monkeypatch.setitem(generate._OVERRIDES, "generate", broken)
    with pytest.raises(BundleError, match=problem):
        verify(exported("bf16")[0])


def test_verify_command(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = exported("bf16")
    out, err = run(capsys, "verify", path, "--json")
    assert json.loads(out)["digest"] == report.digest
    assert f"{path}: sound, 13 files" in err.replace("\n", "")


def test_generate_streams_what_it_returns(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("bf16")[0]
    options = ["-p", "hello there", "--max-new-tokens", "12"]
    out, err = run(capsys, "generate", path, *options, "--json")
    result = json.loads(out)
    assert result["prompt_tokens"] == 12
    assert result["new_tokens"] == 12
    streamed, err = run(capsys, "generate", path, *options)
    assert streamed.rstrip("\n") == result["text"].rstrip("\n")
    assert "12 tokens of prompt and 12 new ones; KV cache" in err
    sampled = [
        run(capsys, "generate", path, *options, "--temperature", "1", "--seed", seed)[0]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_complete_counts_the_bytes_of_its_cache(exported: Exported, plan: Plan) -> None:
    model, tokenizer = kvcompress.load(exported("bf16")[0])
    result = complete(model, tokenizer, "x" * 99, max_new_tokens=8)
    tokens = result.prompt_tokens + result.new_tokens - 1  # the last one was never fed back
    assert result.bf16_kv_cache_bytes == plan.model.bf16_kv_bytes(tokens, batch=1)
    assert 0 < result.kv_cache_bytes < result.bf16_kv_cache_bytes


def test_complete_refuses_an_empty_prompt(exported: Exported) -> None:
    model, tokenizer = kvcompress.load(exported("bf16")[0])
    tokenizer.backend_tokenizer.post_processor = None  # no BOS
    with pytest.raises(ValueError, match="the prompt is empty"):
        complete(model, tokenizer, "", max_new_tokens=1)


@pytest.mark.parametrize(("context", "batch"), [(None, 1), (300, 3), (8, 1)])
def test_inspect_adds_up(exported: Exported, plan: Plan, context: int | None, batch: int) -> None:
    found = inspect(exported("int8")[0], context, batch)
    assert found.context_tokens == (context or 512)
    assert found.kv_cache_bytes == kv_bytes(plan, found.context_tokens, batch)
    assert found.kv_cache_bytes == sum(row.cache_bytes for row in found.heads)
    assert found.bf16_kv_cache_bytes == 2 * 2 * 2 * 32 * 2 * found.context_tokens * batch
    assert found.prefill_bytes == 2 * 2 * 32 * 2 * found.context_tokens * batch
    assert found.weights_format == "int8"
    assert [row.head for row in found.heads] == [0, 1, None] * 2
    assert [row.storage for row in found.heads] == ["k8v4", "int8", "-", "int8", "k8v4", "-"]


def test_inspect_command_takes_bundle_profile_and_plan(
    exported: Exported, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("bf16")[0]
    options = ["--context", 300, "--batch", 3, "--json"]
    three = [
        json.loads(run(capsys, "inspect", place, *options)[0])
        for place in (path, profile_dir, profile_dir / "plan.json")
    ]
    assert three[0]["weights_format"] == "bf16"
    assert three[1]["weights_format"] is three[2]["weights_bytes"] is None
    assert three[0]["heads"] == three[1]["heads"] == three[2]["heads"]
    table, _ = run(capsys, "inspect", path)
    assert "special+frequent 0.25" in table
    assert "256.00 KiB" in table  # 512 tokens in bf16


def test_inspect_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan"):
        inspect(tmp_path / "nowhere")
