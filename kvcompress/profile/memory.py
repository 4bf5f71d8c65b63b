"""How much a profile may hold at once, and what it does with little: fewer rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from kvcompress.errors import ProfileError
from kvcompress.plan import ModelShape
from kvcompress.profile.collect import CHUNK_ROWS, held_out_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCRATCH_BYTES: Final = 2**28  # for the rows of one layer, where nobody sets a limit
_LEAST_SCRATCH: Final = 2**24
_FLOAT_BYTES: Final = 4
_STATES: Final = 16  # vectors as long as a hidden state that the backward pass keeps per layer
_TEMPORARIES: Final = 4  # of the size of a chunk's attention, at the same time


def used_bytes(device: torch.device) -> int:
    """What this process holds now, on the device that computes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def prompt_bytes(model: PreTrainedModel, shape: ModelShape, tokens: int) -> int:
    """What one prompt takes at least: keys, values, gradients and predictions of its last rows."""
    rows = held_out_rows(tokens)
    config = model.config.get_text_config(decoder=True)
    keys = 2 * shape.layers * shape.kv_heads * tokens * shape.head_dim
    states = _STATES * shape.layers * rows * config.hidden_size
    predictions = 4 * rows * config.vocab_size
    return _FLOAT_BYTES * (keys + states + predictions)


def scratch_bytes(
    model: PreTrainedModel, shape: ModelShape, tokens: int, limit_bytes: int | None
) -> int:
    """What is left for rows of attention and their sums.

    Args:
        tokens: length of a prompt.
        limit_bytes: of the whole process, or of what it holds on its GPU; None is no limit.

    Raises:
        ProfileError: if the limit is too small for this model and these prompts.
    """
    if limit_bytes is None:
        return SCRATCH_BYTES
    needed = used_bytes(model.device) + prompt_bytes(model, shape, tokens)
    left = limit_bytes - needed
    if left < _LEAST_SCRATCH:
        raise ProfileError(
            f"a memory limit of {limit_bytes >> 20} MiB is too small: the model and a prompt of "
            f"{tokens} tokens need {(needed + _LEAST_SCRATCH) >> 20} MiB; raise it, or set "
            "calibration.tokens lower"
        )
    return min(left, SCRATCH_BYTES)


def rows_at_once(scratch: int, query_heads: int, tokens: int) -> int:
    """Rows whose attention fits into `scratch` bytes, 1 to `CHUNK_ROWS`."""
    fit = scratch // (_TEMPORARIES * _FLOAT_BYTES * query_heads * tokens)
    return max(1, min(CHUNK_ROWS, fit))
