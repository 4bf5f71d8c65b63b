"""FastGen's keep-sets. Pure data."""

from __future__ import annotations

from kvcompress.plan import Budget, HeadPlan, KVDtype


def fastgen_ladder(
    frequent: Budget | None, local: Budget | None, k_dtype: KVDtype, v_dtype: KVDtype
) -> tuple[HeadPlan, ...]:
    """FastGen's keep-sets in cost order, each holding the one before it.

    Source: arXiv 2310.01801, section 3.3. Differs from the paper: all hold sinks and recent tokens.
    """
    stored = {"k_dtype": k_dtype, "v_dtype": v_dtype}
    parts: tuple[dict[str, object], ...] = (
        {"special": True},
        {"special": True, "punct": True},
        {"special": True, "punct": True, "frequent": frequent},
        {"special": True, "punct": True, "frequent": frequent, "local": local},
        {"full": True},
    )
    return tuple(HeadPlan(**part, **stored) for part in parts)  # type: ignore[arg-type]
