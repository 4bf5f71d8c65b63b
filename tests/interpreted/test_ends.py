"""The ends of every dtype through the Triton encoder, against the codec, to the last bit."""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.compact_quantize import reference
from kvcompress.kernels.view import KeyConstants, PromptView
from kvcompress.quant.codec import value_groups
from tests.kernels.cases import empty_codes
from tests.kernels.ends import CODES, broken, ends, same_bits


# NumPy, which computes in place of a GPU, says where float32 overflows: a key over its scale may
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", CODES)
def test_ends(code, dtype):
    from kvcompress.kernels.compact_quantize.triton import compact_quantize

    dim = 128
    rows = torch.cat([ends(dtype, dim), broken(dtype, dim)])
    key, value = rows[None, None], rows.flip(0)[None, None].contiguous()
    count = len(rows)
    kept = torch.stack([torch.zeros(count), torch.zeros(count), torch.arange(count)]).long()
    constants = torch.full((1, dim), 0.25), torch.full((1, dim), 0.5)
    results = []
    for kernel in (compact_quantize, reference.compact_quantize):
        keys = empty_codes(code, count, dim, 1, dtype)
        values = empty_codes(code, count, dim, value_groups(code, dim), dtype)
        kernel(PromptView(key, value, kept, kept[2]), KeyConstants(*constants), keys, values)
        results.append((keys, values))
    for ours, theirs in zip(*results, strict=True):
        if code == "model" and dtype == torch.bfloat16:
            # the interpreter cuts off where bfloat16 is rounded, and knows no subnormal ones
            one, other = ours.data.float(), theirs.data.float()
            torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-38, equal_nan=True)
        else:
            same_bits(ours, theirs)
