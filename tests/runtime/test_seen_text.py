"""Which tokens a cache has seen, however they came."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.cache.seen_text import UNDO_TOKENS, SeenText
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import cache_of
from tests.runtime.models import VOCAB, build, prompts

PADS = [7, 0]


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    return attach(
        model, uniform(shape_of(model.config, model.dtype), HeadPlan(frequent=Budget(tokens=9)))
    )


def digest_of(*chunks: torch.Tensor) -> SeenText:
    digest = SeenText()
    for chunk in chunks:
        digest.update(chunk)
    return digest


def test_a_digest_does_not_depend_on_the_chunks():
    ids = torch.randint(0, 2**31, (2, 400), generator=torch.Generator().manual_seed(0))
    whole = digest_of(ids)
    for cuts in ([1, 399], [100] * 4, [1] * 400, [5, 0, 395]):
        assert digest_of(*ids.split(cuts, 1)).rows == whole.rows
    assert len(set(whole.rows)) == 2
    for row, column in ((0, 0), (1, 399), (0, 200)):
        other = ids.clone()
        other[row, column] += 1
        with pytest.raises(KVCompressError, match=f"row {row}: the first 400 ids are not"):
            whole.check(other, 400)
    whole.check(torch.cat([ids, ids], 1), 400)


class NoHost(TorchDispatchMode):
    """Fails where numbers would go to the host: a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), name
        assert name != "aten::_to_copy" or (kwargs or {}).get("device") is None, name
        return func(*args, **(kwargs or {}))


def test_decoded_tokens_are_hashed_when_somebody_asks(monkeypatch):
    ids = torch.randint(0, 97, (2, 1300), generator=torch.Generator().manual_seed(0))
    whole = digest_of(ids)
    digest = digest_of(ids[:, :9])
    hashed = []
    real = SeenText._hash
    monkeypatch.setattr(SeenText, "_hash", lambda s, i: (hashed.append(i.shape[1]), real(s, i)))
    with NoHost():
        for column in ids[:, 9:1000].split(1, 1):
            digest.update(column)
            column.zero_()  # the caller's own to change
    assert hashed == [] and digest.tokens == 1000
    ids = torch.randint(0, 97, (2, 1300), generator=torch.Generator().manual_seed(0))
    for column in ids[:, 1000:].split(1, 1):
        digest.update(column)
    assert hashed == [1024]
    copied, packed = copy.deepcopy(digest), pickle.loads(pickle.dumps(digest))
    assert digest.rows == copied.rows == packed.rows == whole.rows
    assert sum(hashed) == 1291


def test_a_digest_follows_rows_and_takes_tokens_back():
    ids = torch.randint(0, 97, (3, 300), generator=torch.Generator().manual_seed(0))
    digest = digest_of(ids[:, :290], ids[:, 290:])
    digest.crop(12)
    assert (digest.tokens, digest.rows) == (288, digest_of(ids[:, :288]).rows)
    digest.select_rows([2, 2, 0])
    digest.crop(3)
    assert digest.rows == digest_of(ids[[2, 2, 0], :285]).rows
    with pytest.raises(
        ValueError, match=f"cannot forget 250 tokens, only up to {UNDO_TOKENS - 15}"
    ):
        digest.crop(250)


def test_a_wrong_beginning_is_refused():
    digest = digest_of(torch.arange(12).reshape(2, 6))
    with pytest.raises(KVCompressError, match="5 tokens of ids, the cache has seen 6"):
        digest.check(torch.arange(10).reshape(2, 5), 6)
    with pytest.raises(KVCompressError, match="1 rows of ids, the cache holds 2"):
        digest.check(torch.arange(12).reshape(1, 12), 6)
    digest.update(None)
    with pytest.raises(KVCompressError, match="seen 6 tokens and not the ids"):
        digest.check(torch.arange(12).reshape(2, 6), 6)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_the_digest_of_a_cache_follows_generate(model, way):
    inputs = prompts(2, 30, PADS)
    out = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True, **way
    )
    seen = cache_of(out).seen_text
    assert seen.tokens == cache_of(out).get_seq_length()
    assert seen.rows[0] != seen.rows[-1]
    if not way:
        cache_of(out).check_prefix(out.sequences)
        with pytest.raises(KVCompressError, match="row 0: the first 37 ids"):
            cache_of(out).check_prefix(out.sequences.flip(0))


def test_the_digest_of_a_cache_follows_drafts(model):
    ids = prompts(1, 30)["input_ids"].repeat(1, 2)
    out = model.generate(
        input_ids=ids, max_new_tokens=12, prompt_lookup_num_tokens=4, return_dict_in_generate=True
    )
    cache_of(out).check_prefix(out.sequences)
    wrong = out.sequences.clone()
    wrong[0, 65] = (wrong[0, 65] + 1) % VOCAB
    with pytest.raises(KVCompressError, match="row 0: the first"):
        cache_of(out).check_prefix(wrong)
