"""What a prompt leaves to compiled kernels: kept tokens as codes, by the C kernels on a CPU and by
Triton on a GPU, and there column sums.

Elsewhere `score_queries` and `store_prompt` do the same with tensor operations, block by block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvcompress.kernels.available import triton_status
from kvcompress.kernels.cpu import layout
from kvcompress.kernels.cpu.library import Library, library
from kvcompress.kernels.view import (
    CodesView,
    KeyConstants,
    PromptView,
    Reach,
    Softmax,
    VotersView,
)
from kvcompress.runtime.store.segments import SegmentStore


@cache
def triton_runs(device: torch.device) -> bool:
    """Whether `device` is a GPU that runs Triton's; `kvcompress doctor` says why not."""
    return device.type == "cuda" and triton_status(device).usable


def column_sums(
    query: Tensor,
    key: Tensor,
    normaliser: Tensor,
    place: Tensor,
    weight: Tensor,
    scaling: float,
    softcap: float | None,
    most: int | None,
) -> Tensor:
    """Weighted column sums of rows that see every key up to their own, or the newest `most`.

    Args:
        query: ``[B, Hq, R, D]``; key: ``[B, Hkv, S, D]``.
        normaliser: ``[B, Hq, R]`` float32 over all that a row sees.
        place: ``[R]`` int64, each row's own place among the keys.
        weight: ``[B, R]`` float32.

    Returns:
        ``[B, Hkv, S]`` float32.
    """
    from kvcompress.kernels.prefill_colsum.triton import prefill_colsum

    device = query.device
    first = torch.zeros(len(query), dtype=torch.int64, device=device)
    voters = VotersView(query, key, normaliser, place.to(device), weight, first)
    return prefill_colsum(voters, Softmax(scaling, softcap), Reach(most or 0, 0))


def encode_kept(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    slots: Tensor,
    constants: tuple[Tensor, Tensor],
    store: SegmentStore,
) -> bool:
    """Encode tokens ``[3, N]`` (row, KV head, token) of a prompt into flat `slots` ``[N]``.

    Args:
        key, value: ``[B, Hkv, T, ·]``.
        constants: centre and scale ``[Hkv, D]`` float32 of the keys.
        store: its codes are changed; positions and scores are not.

    Returns:
        False where no kernel serves these tensors; nothing is changed then.
    """
    kernels, kinds = library(), {store.kind.k_dtype, store.kind.v_dtype}
    if not kinds <= layout.STORED:
        return False
    if key.device.type == "cpu" and kernels is not None and _c_serves(key, value):
        _encode_in_c(kernels, key, value, kept, slots, constants, store)
        return True
    if not triton_runs(key.device):
        return False
    from kvcompress.kernels.compact_quantize.triton import compact_quantize

    prompt = PromptView(key, value, kept, slots)
    compact_quantize(prompt, KeyConstants(*constants), *_codes(store))
    return True


def _codes(store: SegmentStore) -> tuple[CodesView, CodesView]:
    kind = store.kind
    return (
        CodesView.of(store.keys, kind.k_dtype, store.head_dim),
        CodesView.of(store.values, kind.v_dtype, store.value_dim),
    )


def _c_serves(key: Tensor, value: Tensor) -> bool:
    same = key.dtype == value.dtype and str(key.dtype)[6:] in ("float32", "bfloat16", "float16")
    return same and max(key.shape[-1], value.shape[-1]) <= layout.MAX_DIM


def _encode_in_c(
    kernels: Library,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    slot: Tensor,
    constants: tuple[Tensor, Tensor],
    store: SegmentStore,
) -> None:
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    batch, heads, tokens, _ = key.shape
    count, model, slots = len(slot), str(key.dtype)[6:], len(store.position)
    bounds = torch.tensor([[batch], [heads], [tokens], [slots]])
    places = torch.cat([kept, slot[None]])
    if not bool(((places >= 0) & (places < bounds)).all()):
        raise ValueError("kept tokens, or their slots, lie outside of what they are named in")
    prompt = PromptView(key, value, kept.contiguous(), slot.contiguous())
    axes = {"B": batch, "H": heads, "T": tokens, "D": store.head_dim, "Dv": store.value_dim}
    keys = KeyConstants(*(t.contiguous() for t in constants))
    k, v = (layout.codes_struct(codes, model, slots) for codes in _codes(store))
    kernels.compact(
        k,
        v,
        layout.CompactionStruct(
            layout.pack(layout.PromptStruct, prompt, model, kept=count, **axes),
            layout.pack(layout.ConstantsStruct, keys, model, **axes),
            *(count, batch, heads, tokens),
            *(layout.DTYPES[model], torch.get_num_threads()),
        ),
    )
