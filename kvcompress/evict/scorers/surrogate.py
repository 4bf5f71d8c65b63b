"""A linear surrogate of KVzip+: the score of a token from its hidden state alone.

    log s⁺ ≈ w_h · hidden + b_h
for KV head h, hidden the input of the attention module. Prompts, parts of prompts and decoded
tokens are scored alike, when they arrive and for good; no attention weight is needed. The weights
are trained by the profiler on the model at hand, see `kvcompress.profile.surrogate`. The newest
tokens have not been used yet, so a plan should protect them with a local window.

Source: KVzap (arXiv 2601.07891), the linear variant.
Differs from the paper: ridge regression in closed form, on some ten thousand tokens.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.errors import PlanError
from kvcompress.evict.scorers.base import Scorer, Tokens

WEIGHTS: Final = "surrogate"


class SurrogateScorer(Scorer):
    """See the module docstring; ``tensors["surrogate"]`` is ``[Hkv, hidden + 1]``, b_h last."""

    uses_attention = False
    needs = frozenset({"hidden"})
    trained = (WEIGHTS,)

    def arrive(self, tokens: Tokens) -> Tensor:
        if tokens.hidden is None or WEIGHTS not in tokens.tensors:
            raise PlanError(
                f"layer {tokens.layer}: the surrogate has no trained weights; profile the model "
                "with a recipe whose keep.scorer is surrogate, and use the constants it writes"
            )
        weight = tokens.tensors[WEIGHTS][tokens.head].float()
        return (
            torch.einsum("btd,hd->bht", tokens.hidden.float(), weight[:, :-1])
            + weight[None, :, -1:]
        )


SURROGATE = SurrogateScorer("surrogate")
