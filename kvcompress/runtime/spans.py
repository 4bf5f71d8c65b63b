"""What a caller names by tokens: protected spans, and the classes that a plan keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.plan import Plan

Span = tuple[int, int] | range


def row_spans(
    protect: Sequence[Span] | Sequence[Sequence[Span]],
) -> tuple[range, ...] | list[tuple[range, ...]]:
    """One tuple of disjoint ranges for every row, or a list of them."""
    items: list[Any] = list(protect)
    nested = items and all(
        not isinstance(i, range) and not (len(i) == 2 and all(isinstance(n, int) for n in i))
        for i in items
    )
    if nested:
        return [_of_row(row) for row in items]
    return _of_row(items)


def _of_row(items: Sequence[Span]) -> tuple[range, ...]:
    spans = sorted(
        (i if isinstance(i, range) else range(*i) for i in items), key=lambda span: span.start
    )
    for span in spans:
        if span.start < 0 or span.stop <= span.start or span.step != 1:
            raise KVCompressError(f"protect: ({span.start}, {span.stop}) is not a range of tokens")
    for before, after in zip(spans, spans[1:], strict=False):
        if after.start < before.stop:
            raise KVCompressError(
                f"protect: ({before.start}, {before.stop}) and ({after.start}, {after.stop}) "
                "overlap; join them"
            )
    return tuple(spans)


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
