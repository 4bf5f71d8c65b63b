"""What a layer is told: of a forward by the cache, of its attention by the attention function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.prompt.attention_inputs import NOTHING, AttentionInputs
from kvcompress.runtime.store.attend import Chunk

# the model's normal attention over the chunk alone; None where it has no such kernel
FastAttention = Callable[[], Tensor] | None
T = TypeVar("T")


def refuse_change(name: str, held: T, came: T) -> None:
    """
    Raises:
        KVCompressError: where a forward differs from what the cache holds.
    """
    if held != came:
        raise KVCompressError(
            f"the cache holds tokens of {name} {held}, this forward has {name} {came}: pass the "
            "same batch to the same model, or call cache.reset()"
        )


@dataclass(slots=True)
class ForwardInfo:
    """What the cache knows of a forward before its layers run, shared by all of them.

    Attributes:
        flags: ``[B, T]`` uint8 class flags, or None.
        final_tokens: tokens at its head that will not be taken back; the rest of the chunk is a
            draft. None: all, or, while a cache records, none but those of a first prompt.
        in_prompt: the forward is a part of a prompt that goes on, whatever its length.
        length: T, 0 where it is not known.
        reads_again: it repeats a held prompt: its queries vote, and nothing of it is stored.
    """

    flags: Tensor | None = None
    final_tokens: int | None = None
    in_prompt: bool = False
    length: int = 0
    reads_again: bool = False


@dataclass(slots=True)
class Progress:
    """How far a layer has come; a cache file keeps it.

    Attributes:
        seen: tokens, kept or not, pads counted.
        record_past: drafted tokens can be taken back.
        decoded: the last forward decoded, so that a prompt opens a turn.
    """

    seen: int = 0
    record_past: bool = False
    decoded: bool = False

    def final_tokens(self, length: int, info: ForwardInfo, started: bool) -> int:
        """Tokens at the head of a chunk of `length` that will not be taken back.

        Args:
            started: tokens came before it.
        """
        if not self.record_past:
            return length
        final = info.final_tokens
        if final is None:
            final = 0 if started else length
        return 0 if final == 1 and started else final


@dataclass(slots=True)
class AttentionCall:
    """One call of the attention function of a layer.

    Attributes:
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, T, ·]`` as `update` gave them to the model.
        mask: ``[B, 1, T, T]`` bool or None (causal).
        scaling, softcap: of the softmax.
        sinks: ``[Hq]`` learned logits that join every softmax, or None.
        fast: the model's own attention over the chunk alone, ``[B, T, Hq, D]``.
        reader: number of the layer that attends, which may read another layer's keys; None is the
            layer that stored them.
        inputs: what the attention module tells beside them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    fast: FastAttention = None
    reader: int | None = None
    inputs: AttentionInputs = NOTHING

    def check_mask(self) -> None:
        """
        Raises:
            KVCompressError: for a mask that does not say which tokens of the chunk see each other.
        """
        mask, length = self.mask, self.query.shape[2]
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-2:] != (length, length)):
            raise KVCompressError(
                f"an attention mask {tuple(mask.shape)} of {mask.dtype} cannot be combined with "
                "the compressed cache; pass the usual 2-dimensional attention_mask"
            )

    def chunk(self, stored: tuple[Tensor, Tensor], position: int, flags: Tensor | None) -> Chunk:
        """The tokens that arrive.

        Args:
            stored: keys and values as `update` got them.
            position: of the first token.
            flags: ``[B, T]`` class flags, or None.
        """
        self.check_mask()
        mask, valid = self.mask, None
        if mask is not None:
            valid = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(self.query.shape[0], -1)
            valid = None if bool(valid.all()) else valid
        return Chunk(
            self.query.detach(),
            stored[0].detach(),
            stored[1].detach(),
            position,
            mask,
            valid,
            None if flags is None else flags.to(self.query.device),
            self.scaling,
            self.softcap,
            self.sinks,
        )
