"""Chosen tokens of a prompt into codes."""

from __future__ import annotations

from torch import Tensor

from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes, encode, rounded, value_groups


def compact_quantize(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    slots: Tensor,
    center: Tensor,
    key_scale: Tensor,
    keys: Codes,
    values: Codes,
    k_dtype: KVDtype,
    v_dtype: KVDtype,
) -> None:
    """Encode tokens of a prompt into flat slots, once.

    Args:
        key, value: ``[B, Hkv, T, ·]`` of the whole prompt.
        kept: ``[3, N]`` int64: row, KV head and token of what is kept.
        slots: ``[N]`` int64, all different.
        center, key_scale: ``[Hkv, D]`` float32 key constants.
        keys, values: flat codes, changed in place.
    """
    row, head, token = kept
    k = (key[row, head, token].float() - center[head]) / key_scale[head]
    v = value[row, head, token]
    k = rounded(k, key.dtype) if k_dtype == "model" else k
    groups = value_groups(v_dtype, v.shape[-1])
    for target, source in ((keys, encode(k, k_dtype)), (values, encode(v, v_dtype, groups))):
        target.data[slots] = source.data
        if target.scale is not None and source.scale is not None:
            target.scale[slots] = source.scale
        if target.minimum is not None and source.minimum is not None:
            target.minimum[slots] = source.minimum
