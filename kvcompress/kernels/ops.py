"""The kernels of a decode step as operators of torch, so that a compiled graph takes them whole.

Each calls the Triton kernel of its name, with the arguments of its reference. An operator cannot
take views, so their fields are passed one by one: `exact.k` as ``exact_k``. Triton is imported when
one first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from kvcompress.kernels.decode_combine import reference as combine
from kvcompress.kernels.decode_split import reference as split
from kvcompress.kernels.kv_append import reference as append
from kvcompress.kernels.row_advance import reference as advance
from kvcompress.kernels.score_select import reference as select
from kvcompress.kernels.view import (
    Advanced,
    Combined,
    ExactView,
    Field,
    GroupView,
    HeadsView,
    PartsView,
    PiecesView,
    Reach,
    RoomView,
    RowsView,
    RuleView,
    Softmax,
    TokenView,
    Weakest,
    field_of,
    flat,
    leaves,
    packed,
)

P = ParamSpec("P")
R = TypeVar("R")
_WORDS: Final = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str"}


def operator(changes: str, fake: Callable[P, R], reference: Callable[P, R]) -> Callable[P, R]:
    """A kernel as an operator.

    Args:
        changes: names of the leaves that it writes to.
        fake: empty results of its arguments.
        reference: has its name, and annotations that make its schema.
    """
    name, written = reference.__name__, changes.split()
    hints = get_type_hints(reference, include_extras=True)
    result = hints.pop("return")
    arguments = [field_of(parameter, hint) for parameter, hint in hints.items()]

    def run(*values: object) -> Tensor | tuple[Tensor, ...] | None:
        module = import_module(reference.__module__.replace(".reference", ".triton"))
        return _plain(getattr(module, name)(*_views(arguments, values)))

    def empty(*values: object) -> Tensor | tuple[Tensor, ...] | None:
        return _plain(fake(*_views(arguments, values)))  # type: ignore[arg-type, call-arg]

    own = torch.library.custom_op(
        f"kvcompress::{name}", run, mutates_args=written, schema=schema(arguments, written, result)
    )
    own.register_fake(empty)

    def call(*views: P.args, **_: P.kwargs) -> R:
        found = own(*flat(views))
        if result is type(None):
            return found
        return result(*(found if isinstance(found, tuple) else (found,)))

    return call


def schema(arguments: list[Field], written: list[str], result: type) -> str:
    """As torch has it: ``(Tensor exact_k, Tensor(a!) position) -> (Tensor, Tensor)``."""
    own = [leaf for argument in arguments for leaf in leaves(argument)]
    unknown = set(written) - {leaf.name for leaf in own}
    assert not unknown, f"no arguments: {unknown}"
    words: list[str] = []
    for leaf in own:
        word = _WORDS[leaf.kind]
        if leaf.name in written:
            word += f"(a{len(words)}!)"
        words.append(f"{word}{'?' * leaf.optional} {leaf.name}")
    results = 0 if result is type(None) else len(result._fields)  # type: ignore[attr-defined]
    return f"({', '.join(words)}) -> ({', '.join(['Tensor'] * results)})"


def _views(arguments: list[Field], values: tuple[object, ...]) -> list[object]:
    rest = iter(values)
    return [packed(argument, rest) for argument in arguments]


def _plain(found: object) -> Tensor | tuple[Tensor, ...] | None:
    """A result as torch takes it: a lone tensor by itself."""
    if not isinstance(found, tuple):
        return None
    return found[0] if len(found) == 1 else tuple(found)


# ---- results without numbers
def _nothing(*_: object) -> None:
    return None


def _combined(
    token: TokenView,
    exact: ExactView,
    heads: HeadsView,
    parts: PartsView,
    rows: RowsView,
    softmax: Softmax,
    reach: Reach,
) -> Combined:
    batch, kv_heads, held, _ = exact.k.shape
    count = token.query.shape[1]
    group = (batch, kv_heads, count // kv_heads)
    return Combined(
        token.query.new_empty(batch, 1, count, exact.v.shape[-1]),
        parts.maximum.new_empty(group),
        parts.maximum.new_empty(*group, held + 1),
    )


def _advanced(
    flags: Tensor | None, exact: ExactView, rows: RowsView, room: RoomView, rule: RuleView
) -> Advanced:
    return Advanced(rows.seen.new_empty(len(rows.start), 3), torch.empty_like(room.budget))


def _weakest(
    logits: Tensor | None,
    lse: Tensor,
    granted: Tensor,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    rule: RuleView,
) -> Weakest:
    count = len(pieces.work)
    return Weakest(lse.new_empty(count), rows.seen.new_empty(count))


decode_pieces = operator(
    "parts_accumulated parts_maximum parts_total logits", _nothing, split.decode_pieces
)
decode_combine = operator("", _combined, combine.decode_combine)
row_advance = operator(
    "exact_position exact_flags rows_row_seen rows_start rows_class_counts",
    _advanced,
    advance.row_advance,
)
score_select = operator("group_score", _weakest, select.score_select)
kv_append = operator(
    "exact_k exact_v group_k_data group_k_scale group_k_minimum group_v_data group_v_scale "
    "group_v_minimum group_position group_score group_recent_score",
    _nothing,
    append.kv_append,
)
