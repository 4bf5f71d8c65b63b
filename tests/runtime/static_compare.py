"""What two static caches hold, slot by slot."""

from __future__ import annotations

import torch

from kvcompress.runtime.static.cache import StaticCompressedCache


def assert_same_arrays(
    ours: StaticCompressedCache, theirs: StaticCompressedCache, tolerance: float
) -> None:
    """Codes, positions and counters equal to the last bit, scores within `tolerance`.

    The last slot of flat arrays is spare: what is dropped may be written there.
    """
    for number, (one, other) in enumerate(
        zip(ours.static_layers, theirs.static_layers, strict=True)
    ):
        for index, (a, b) in enumerate(zip(_arrays(one), _arrays(other), strict=True)):
            where = f"layer {number}, array {index} {tuple(a.shape)}"
            if a.dtype == torch.float32:
                torch.testing.assert_close(
                    a.cpu(), b.cpu(), atol=tolerance, rtol=tolerance, msg=where
                )
            else:
                assert torch.equal(_bits(a).cpu(), _bits(b).cpu()), where


def _arrays(layer):
    state = layer.fixed
    flat = [t[:-1] for group in state.groups for t in group.per_slot() if t is not None]
    rows = [t for group in state.groups for t in group.row_tensors()]
    return [*state._row_tensors(), state.counter, state.first_vote, *flat, *rows]


def _bits(t):
    return t.view(torch.uint8) if t.is_floating_point() else t
