"""Spans of tokens that a caller protects, and the token classes that a plan keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.plan import Plan
from kvcompress.runtime.store.state import MOST_TOKENS

Span = tuple[int, int] | range


def row_spans(
    protect: Sequence[Span] | Sequence[Sequence[Span]],
) -> tuple[range, ...] | list[tuple[range, ...]]:
    """One tuple of disjoint ranges for every row, or a list of them.

    Raises:
        KVCompressError: for a span that is no range of tokens, or two that overlap.
    """
    items = list(protect)
    if items and all(map(_is_row, items)):
        return [_of_row(row) for row in items]
    return _of_row(items)


def _is_row(item: object) -> bool:
    if isinstance(item, range) or not isinstance(item, Sequence):
        return False
    return not (len(item) == 2 and all(isinstance(bound, int) for bound in item))


def _of_row(items: Sequence[object]) -> tuple[range, ...]:
    spans = sorted(map(_span, items), key=lambda span: span.start)
    for before, after in zip(spans, spans[1:], strict=False):
        if after.start < before.stop:
            raise KVCompressError(
                f"protect: ({before.start}, {before.stop}) and ({after.start}, {after.stop}) "
                "overlap; join them"
            )
    return tuple(spans)


def _span(given: object) -> range:
    try:
        span = given if isinstance(given, range) else range(*given)  # type: ignore[misc]
    except TypeError:
        span = range(0)
    if not 0 <= span.start < span.stop < MOST_TOKENS or span.step != 1:
        raise KVCompressError(
            f"protect: {given} is not a range of tokens (first, end), with 0 <= first < end < 2^31"
        )
    return span


class ClassIds:
    """Token id to class flags."""

    def __init__(self, plan: Plan) -> None:
        self._special = torch.tensor(plan.special_ids, dtype=torch.int64)
        self._punct = torch.tensor(plan.punct_ids, dtype=torch.int64)

    def flags(self, ids: Tensor) -> Tensor:
        """``[B, T]`` uint8."""
        special = torch.isin(ids, self._special.to(ids.device))
        punct = torch.isin(ids, self._punct.to(ids.device))
        return (special * SPECIAL_FLAG + punct * PUNCT_FLAG).to(torch.uint8)
