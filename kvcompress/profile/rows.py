"""Which rows of a prompt are measured, and which vote."""

from __future__ import annotations

FEWEST, MOST = 64, 128


def held_out_rows(length_tokens: int) -> int:
    """Newest query rows of a prompt that are measured and never vote: 64 to 128, at most half."""
    return min(max(FEWEST, min(MOST, length_tokens // 16)), length_tokens // 2)
