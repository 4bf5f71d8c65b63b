"""Two ways to the same answer: fixed tokens, their logits, and how far these lie apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from kvcompress.errors import UnsupportedModelError
from kvcompress.runtime.hf.attach import attending_with
from kvcompress.runtime.names import cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def tolerance(dtype: torch.dtype) -> float:
    """Largest `distance` that rounding explains. In 16 bits it moves logits by about 1 %; wrong
    scales or a wrong mask move them by far more."""
    return 0.05 if dtype.itemsize <= 2 else 1e-4


# what two of transformers' own kernels differ by is one draw; another two may differ by this more
_DRAWS: Final = 3.0


def allowed(model: PreTrainedModel, logits: Callable[[], Tensor]) -> float:
    """Largest `distance` that rounding explains in this model: as `tolerance`, or more where two of
    transformers' own kernels differ by more. Weights in int8 have activations rounded, too, and a
    change of the last bit then moves some of them by a whole step.

    Args:
        logits: of some tokens, by the model without a plan.
    """
    found = []
    for kernel in ("eager", "sdpa"):
        try:
            with attending_with(model, kernel):
                found.append(logits())
        except UnsupportedModelError:  # it has the other one alone
            return tolerance(model.dtype)
    return max(tolerance(model.dtype), _DRAWS * distance(found[0], found[1]))


def distance(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖"""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def fixed_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Token ids ``[1, count]`` spread over the vocabulary, the same at every call."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return ((7 + 31 * torch.arange(count)) % weight.shape[0])[None].to(model.device)


@torch.inference_mode()
def generated(
    model: PreTrainedModel, ids: Tensor, steps: int, **way: object
) -> tuple[Tensor, Tensor, Cache | None]:
    """New tokens ``[≤ steps]`` of a greedy `generate`, their logits ``[≤ steps, vocabulary]`` in
    float32, and the cache that it used.

    Args:
        way: further arguments of `generate`.
    """
    call = cast(Any, model.generate)
    output = call(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        **way,
    )
    tokens = output.sequences[0, ids.shape[1] :]
    return tokens, torch.cat(output.logits).float(), cache_of(output)


def same_text_steps(found: Tensor, wanted: Tensor) -> int:
    """Steps of two generations whose logits can be compared: as far as both had the same tokens
    before them. Another token may be chosen where two are nearly equal; what follows it is another
    text."""
    steps = min(len(found), len(wanted))
    differs = (found[:steps] != wanted[:steps]).nonzero()
    return int(differs[0]) + 1 if len(differs) else steps
