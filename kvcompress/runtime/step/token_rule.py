"""The rule of one decoded token, in plain PyTorch, for every layout that a layer may have.

The token takes the exact slot of the oldest recent one. What lay there leaves: in each head it is
encoded over the slot of the weakest token, if that is no stronger than itself, or is dropped.

Two layouts show their slots as dense views and run this rule on them: `step.store_token` a store
that grows, ``[S, C]``, and `static.step` fixed arrays, ``[B, H, C]``, as one compiled graph. The
compiled kernels on the CPU and the Triton kernels are tested against these two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvcompress.evict.keepset import HeadRules, class_score, priority
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes, encode, rounded, value_groups
from kvcompress.runtime.store.segments import EMPTY, in_spans
from kvcompress.runtime.store.state import LayerSettings


class ExactSlots(Protocol):
    """The sinks and recent tokens of a layer, see `LayerState`."""

    exact_k: Tensor
    exact_v: Tensor
    exact_position: Tensor
    exact_class: Tensor | None


@dataclass(slots=True)
class LeavingToken:
    """The token of each row that leaves the exact slots.

    Attributes:
        slot: ``[B]`` int64 where it lies, and where the new token goes.
        key, value: ``[B, Hkv, D]``.
        position: ``[B]`` int64, −1 if nothing leaves.
        flags: ``[B]`` int64 class flags.
    """

    slot: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    flags: Tensor

    @staticmethod
    def at(held: ExactSlots, slot: Tensor) -> LeavingToken:
        """What lies in the exact slots `slot` ``[B]``."""
        index, place = slot[:, None], slot[:, None, None, None]
        position = held.exact_position.gather(1, index)[:, 0].long()
        flags = torch.zeros_like(position)
        if held.exact_class is not None:
            flags = held.exact_class.gather(1, index)[:, 0].long()
        key, value = (
            t.gather(2, place.expand(-1, t.shape[1], 1, t.shape[3]))[:, :, 0]
            for t in (held.exact_k, held.exact_v)
        )
        return LeavingToken(slot, key, value, position, flags)

    def score(self, classes: Tensor, recent: Tensor) -> Tensor:
        """``[B, H, 1]`` score that it competes with.

        Args:
            classes: ``[H]`` or ``[B, H]`` class bits of the heads.
            recent: ``[B, H, 1]`` its score among the recent tokens.
        """
        return class_score(classes.unsqueeze(-1), self.flags[:, None, None], recent)

    def in_class(self, classes: Tensor) -> Tensor:
        """``[B, H, 1]`` bool: it is of a class that the head keeps."""
        return (self.flags[:, None, None] & classes.unsqueeze(-1)) != 0


def take_exact_slot(
    held: ExactSlots, slot: Tensor, key: Tensor, value: Tensor, position: Tensor, flags: Tensor
) -> None:
    """A token takes the exact slots `slot` ``[B]``, in place.

    Args:
        key, value: ``[B, Hkv, 1, D]``.
        position, flags: ``[B]``.
    """
    index, place = slot[:, None], slot[:, None, None, None]
    held.exact_k.scatter_(2, place.expand(key.shape), key)
    held.exact_v.scatter_(2, place.expand(value.shape), value)
    held.exact_position.scatter_(1, index, position[:, None].to(torch.int32))
    if held.exact_class is not None:
        held.exact_class.scatter_(1, index, flags[:, None].to(torch.uint8))


@dataclass(slots=True)
class Segments:
    """Segments of equal capacity, and the token that wants a slot in each; ``*S`` is the layout's.

    Attributes:
        head: index into the rules, see `priority`; broadcastable to ``[*S, 1]``.
        window: ``[*S, 1]`` local window in tokens.
        start: ``[*S, 1]`` int64 position of the row's first real token.
        bounds: ``[*S, 1, spans, 2]`` of protected tokens, or None.
        position: ``[*S, C]``, −1 where empty; own_position ``[*S, 1]``.
        score: ``[*S, C]``, or None where heads rank by age; own_score ``[*S, 1]``.
        own_in_class: ``[*S, 1]`` bool; None where no head keeps classes without scores.
    """

    head: Tensor | tuple[Tensor, Tensor]
    window: Tensor
    start: Tensor
    bounds: Tensor | None
    position: Tensor
    own_position: Tensor
    score: Tensor | None
    own_score: Tensor | None
    own_in_class: Tensor | None


@dataclass(slots=True)
class Ranked:
    """What is in a segment ``[*S, C + 1]``, the token that wants in as the last.

    Attributes:
        position: −1 where empty or out of the architecture's sight.
        pinned: bool, or None if no row has a protected span.
    """

    rank: Tensor
    position: Tensor
    pinned: Tensor | None


def ranked(
    settings: LayerSettings,
    rules: HeadRules,
    own: Segments,
    now: int | Tensor,
    first_vote: int | Tensor,
) -> Ranked:
    """Priorities of stored tokens and of the token that wants in.

    Args:
        now: position of the newest token; first_vote: as in `LayerState`.
    """
    position = torch.cat([own.position.long(), own.own_position], -1)
    seen = settings.sees(now + 1, position, own.start)
    if seen is not None:
        position = position.masked_fill(~seen, EMPTY)
    score = in_class = pinned = None
    if own.score is not None and own.own_score is not None:
        score = torch.cat([own.score, own.own_score], -1)
    elif own.own_in_class is not None:  # a head that keeps classes without scores holds no others
        only = (rules.classes[own.head] != 0) & ~rules.keeps_rest[own.head]
        in_class = torch.cat([only.expand(own.position.shape), own.own_in_class], -1)
    if own.bounds is not None:
        pinned = in_spans(position - own.start, own.bounds)
    votes = now + 1 - position.clamp(min=first_vote)
    rank = priority(
        rules,
        settings.scorer,
        own.head,
        own.window,
        position,
        score,
        votes,
        now,
        in_class,
        pinned,
    )
    return Ranked(rank, position, pinned)


def weakest(rank: Tensor, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[*S]`` slot that each segment gives up, and whether it does: the last of ``[*S, C + 1]``
    wants in, and is dropped where it is itself the lowest.

    Args:
        usable: ``[*S, 1]`` first slots that may be used; None is all.
    """
    capacity = rank.shape[-1] - 1
    if usable is not None:
        slot = torch.arange(capacity + 1, device=rank.device)
        rank = rank.masked_fill((slot >= usable) & (slot < capacity), torch.inf)
    victim = rank.argmin(-1)
    most = capacity if usable is None else usable[..., 0]
    return victim, (victim < most) & (rank[..., -1] > -torch.inf)


def encoded(
    key: Tensor,
    value: Tensor,
    constants: tuple[Tensor, Tensor],
    k_dtype: KVDtype,
    v_dtype: KVDtype,
) -> tuple[Codes, Codes]:
    """Codes of keys and values ``[*N, D]``.

    Args:
        constants: centre and scale of the keys, broadcastable.
    """
    center, scale = constants
    wide, parts = (key.float() - center) / scale, value_groups(v_dtype, value.shape[-1])
    if k_dtype == v_dtype != "model" and parts == 1 and key.shape == value.shape:
        both = encode(torch.stack([wide, value.float()]), k_dtype)
        return both.each(lambda t: t[0]), both.each(lambda t: t[1])
    if k_dtype == "model":
        return Codes(rounded(wide, key.dtype), None, None), encode(value, v_dtype, parts)
    return encode(wide, k_dtype), encode(value, v_dtype, parts)
