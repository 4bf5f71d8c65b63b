"""The table of settings, and how segments are cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvcompress.kernels
from kvcompress.kernels.tuning import (
    SplitConfig,
    chunk_tokens,
    lookup,
    refuses,
    split_config,
    work_list,
)

CPU = torch.device("cpu")
TABLE = {
    "default": {"int8/int8": {"64": [64, 4, 2, 512]}, "other": {"256": [32, 4, 1, 256]}},
    "sm_90": {"int8/int8": {"128": [128, 8, 3, 1024]}},
}


def test_lookup_prefers_the_architecture_then_the_storage_then_the_width():
    assert lookup(TABLE, "sm_90", "int8/int8", 80) == SplitConfig(128, 8, 3, 1024)
    assert lookup(TABLE, "sm_80", "int8/int8", 64) == SplitConfig(64, 4, 2, 512)
    assert lookup(TABLE, "sm_90", "fp8/int4", 200) == SplitConfig(32, 4, 1, 256)
    with pytest.raises(KeyError, match="no setting for int8/int8 at head_dim 200"):
        lookup(TABLE, "sm_90", "int8/int8", 200)


def test_the_committed_table_has_a_setting_for_everything():
    text = Path(kvcompress.kernels.__file__).with_name("tuning.json").read_text(encoding="utf-8")
    archs = [arch for arch in json.loads(text) if arch != "comment"]
    assert "default" in archs
    for k in ("model", "int8", "int4", "fp8"):
        for v in ("model", "int8", "int4", "fp8"):
            for dim in (16, 64, 96, 128, 192, 256):
                config = split_config(k, v, dim, CPU)
                assert config.tokens in (16, 32, 64, 128, 256)
                assert config.warps in (1, 2, 4, 8)
                assert 1 <= config.stages <= 4
                assert config.chunk_tokens >= config.tokens
                assert config.chunk_tokens & (config.chunk_tokens - 1) == 0


def test_chunks_are_long_where_there_is_much_and_short_where_there_is_little():
    assert chunk_tokens(10**9, 1024, CPU) == 1024
    assert chunk_tokens(3000, 1024, CPU) == 256  # eight pieces and more
    assert chunk_tokens(0, 1024, CPU) == 64


def test_the_work_list_covers_every_slot_once():
    segments = [(0, 100, 0, 0), (100, 0, 0, 1), (100, 64, 1, 0), (164, 129, 1, 1)]
    work = work_list(segments, 64)
    assert [w[1:] for w in work] == [
        [64, 0, 0],
        [36, 0, 0],
        [64, 1, 0],
        [64, 1, 1],
        [64, 1, 1],
        [1, 1, 1],
    ]
    slots = [s for first, count, *_ in work for s in range(first, first + count)]
    assert slots == list(range(293))


def test_a_device_with_more_units_gets_shorter_chunks(monkeypatch):
    properties = type("P", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert chunk_tokens(128 * 32768, 1024, torch.device("cuda")) == 1024
    assert chunk_tokens(8 * 32768, 1024, torch.device("cuda")) == 128


@pytest.mark.parametrize(
    ("k", "v", "dim", "value_dim", "reason"),
    [
        ("int8", "int8", 80, 96, None),
        ("int4", "int4", 256, 4, None),
        ("model", "model", 33, 1, None),
        ("int4", "int8", 18, 18, "int4 of 18 channels"),
        ("int8", "fp8", 64, 33, "fp8 of 33 channels"),
        ("int8", "int8", 320, 64, "int8 of 320 channels"),
    ],
)
def test_storage_that_is_refused(k, v, dim, value_dim, reason):
    found = refuses(k, v, dim, value_dim)
    assert found is None if reason is None else found.startswith(reason)
