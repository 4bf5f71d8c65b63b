"""A memory limit: the same numbers from fewer rows at a time, or a refusal that names the need."""

import re

import pytest
import torch

from kvcompress.errors import ProfileError
from kvcompress.profile import memory
from kvcompress.profile.collect import collected
from kvcompress.profile.run import run
from kvcompress.recipe import BytesPolicy, Calibration, Keep, Recipe
from kvcompress.runtime.model.families import shape_of

RECIPE = Recipe(
    calibration=Calibration(prompts=1, tokens=256),
    policy=BytesPolicy(kind="bytes", keep_ratio=0.4, context=256),
)
MIB = 2**20


def test_a_limit_that_is_too_small_says_what_is_needed(llama, tiny_tokenizer, tmp_path):
    with pytest.raises(ProfileError, match="limit of 100 MiB is too small: .* need") as error:
        run(llama, tiny_tokenizer, RECIPE, tmp_path / "p", memory_limit_bytes=100 * MIB)
    needed = int(re.search(r"need (\d+) MiB", str(error.value))[1])
    profile = run(
        llama, tiny_tokenizer, RECIPE, tmp_path / "p", memory_limit_bytes=(needed + 32) * MIB
    )
    assert profile.losses


def test_fewer_rows_at_a_time_give_the_same(llama):
    shape = shape_of(llama.config, torch.float32)
    ids = list(range(3, 203))
    whole = collected(llama, shape, Keep(), ids)
    parts = collected(llama, shape, Keep(), ids, rows_at_once=7)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.output, b.output)
        torch.testing.assert_close(a.ranks, b.ranks)


def test_rows_fit_into_what_is_left():
    assert memory.rows_at_once(2**28, 9, 1024) == 128
    assert memory.rows_at_once(2**24, 32, 8192) == 4
    assert memory.rows_at_once(1, 32, 8192) == 1
