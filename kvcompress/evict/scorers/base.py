"""What a scorer is: how a token's score starts, grows with attention, and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scorer:
    """One way to rank the `frequent` tokens of a head.

    Attributes:
        uses_attention: whether scores add up attention weights.
        row_weight: weight of a query row's attention, from its index in the row's real tokens.
        initial: score of a token when it is first stored, from its key ``[..., D]``, its position
            ``[...]`` and the KV head ``[...]``.
        rank: larger is kept; from score, position of the token, and votes: the number of query rows
            that saw it.
    """

    name: str
    uses_attention: bool
    row_weight: Callable[[Tensor], Tensor]
    initial: Callable[[Tensor, Tensor, Tensor], Tensor]
    rank: Callable[[Tensor, Tensor], Tensor]
