"""Chosen tokens of a prompt into codes."""

from __future__ import annotations

from torch import Tensor

from kvcompress.kernels.view import CodesView, KeyConstants, PromptView
from kvcompress.quant.codec import encode, rounded


def compact_quantize(
    prompt: PromptView, constants: KeyConstants, k: CodesView, v: CodesView
) -> None:
    """Encode tokens of a prompt into flat slots, once.

    Args:
        constants: ``[Hkv, D]``, heads in the order of the prompt.
        k, v: changed in place.
    """
    row, head, token = prompt.kept
    key, value = prompt.key[row, head, token], prompt.value[row, head, token]
    store(k, v, prompt.slot, key, value, constants.center[head], constants.scale[head])


def store(
    k: CodesView,
    v: CodesView,
    slot: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    scale: Tensor,
) -> None:
    """Encode vectors ``[N, ·]`` into the flat slots ``[N]``; center and scale are of the keys."""
    coded = (key.float() - center) / scale
    coded = rounded(coded, key.dtype) if k.dtype == "model" else coded
    for target, x in ((k, coded), (v, value)):
        source = encode(x, target.dtype, target.groups)
        target.data[slot] = source.data
        if target.scale is not None and source.scale is not None:
            target.scale[slot] = source.scale
        if target.minimum is not None and source.minimum is not None:
            target.minimum[slot] = source.minimum
