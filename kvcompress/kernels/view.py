"""What a kernel is told of a layer, as values: the dtype and shape of every field, written once.

A view is a NamedTuple of tensors, numbers and other views. Its annotations are its table:

    "int32 [B, E]"             a tensor of this dtype and shape, dense, in the order of its axes
    "model [B, H, T, D] strided"   vectors of the model's dtype, each dense, the axes in any order
    "int32"                    a number, as C has it
    "int32 constant"           a number that a Triton kernel is compiled for

Three things are made from the tables: the arguments of the operators of torch (ops.py), those of
the Triton kernels (triton_view.py), and the structures of the C kernels (cpu/layout.py). Axes: B
rows, Hq query heads, H KV heads in the layer's own order, M of them in a group, Ms of these with
scores, G query heads of a KV head, T tokens, E exact slots, R of them recent, D and Dv channels of
keys and values, N slots of a group, Ns of its scored heads, W pieces, S protected spans.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Final, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes

_TABLE: Final = re.compile(r"(\w+)(?: \[([^\]]*)\])?( constant)?( strided)?")


class CodesView(NamedTuple):
    """Codes of one vector for each slot, see quant/codec.py."""

    data: Annotated[Tensor, "codes [N, row]"]
    scale: Annotated[Tensor | None, "float16 [N, groups]"]
    minimum: Annotated[Tensor | None, "float16 [N, groups]"]
    dtype: Annotated[KVDtype, "int32 constant"]
    dim: Annotated[int, "int32 constant"]
    groups: Annotated[int, "int32 constant"]

    @staticmethod
    def of(codes: Codes, dtype: KVDtype, dim: int) -> CodesView:
        groups = 1 if codes.scale is None else codes.scale.shape[-1]
        return CodesView(codes.data, codes.scale, codes.minimum, dtype, dim, groups)


class GroupView(NamedTuple):
    """Heads of a layer with the same storage. Heads that keep scores come first.

    Attributes:
        position: −1 where a slot is empty; a segment fills from its first slot.
        recent_score: of the recent tokens, which have no slot here yet.
    """

    k: CodesView
    v: CodesView
    position: Annotated[Tensor, "int32 [N]"]
    score: Annotated[Tensor | None, "float32 [Ns]"]
    recent_score: Annotated[Tensor | None, "float32 [B, Ms, R]"]


class ExactView(NamedTuple):
    """Tokens that are held uncoded: `sinks` of a row's first ones, then its recent ones.

    Attributes:
        position: −1 where empty.
        flags: class flags, None in a layer that keeps no classes.
    """

    k: Annotated[Tensor, "model [B, H, E, D]"]
    v: Annotated[Tensor, "model [B, H, E, Dv]"]
    position: Annotated[Tensor, "int32 [B, E]"]
    flags: Annotated[Tensor | None, "uint8 [B, E]"]
    sinks: Annotated[int, "int32"]


class KeyConstants(NamedTuple):
    """What keys are coded around: a key is center + scale · code space."""

    center: Annotated[Tensor, "float32 [H, D]"]
    scale: Annotated[Tensor, "float32 [H, D]"]


class TokenView(NamedTuple):
    """The token of each row that arrives; heads in the model's order."""

    query: Annotated[Tensor, "model [B, Hq, T, D] strided"]
    key: Annotated[Tensor, "model [B, H, T, D] strided"]
    value: Annotated[Tensor, "model [B, H, T, Dv] strided"]
    flags: Annotated[Tensor | None, "uint8 [B]"]


class Softmax(NamedTuple):
    """How logits become attention.

    Attributes:
        softcap: logits become softcap·tanh(logit / softcap); None leaves them.
        sinks: learned logits that join every softmax without a value, or None.
    """

    scaling: Annotated[float, "float32"]
    softcap: Annotated[float | None, "float32"] = None
    sinks: Annotated[Tensor | None, "float32 [Hq]"] = None


class Reach(NamedTuple):
    """How far back the architecture lets a query see; 0 is no such limit.

    Attributes:
        window: tokens of sliding attention.
        block: tokens of an aligned block, counted from a row's first real token.
    """

    window: Annotated[int, "int64 constant"]
    block: Annotated[int, "int64 constant"]


class RowsView(NamedTuple):
    """Where each row of the batch is.

    Attributes:
        seen: scalar, tokens that have come with padding, the arriving one included.
        start: position of the first real token; −1 before it has come.
        row_seen: real tokens.
        class_counts: coded tokens by class flags, None in a layer that keeps no classes.
        valid: False where the arriving token is padding, which changes nothing; None: none is.
    """

    seen: Annotated[Tensor, "int64 []"]
    start: Annotated[Tensor, "int32 [B]"]
    row_seen: Annotated[Tensor, "int32 [B]"]
    class_counts: Annotated[Tensor | None, "int32 [B, 4]"]
    valid: Annotated[Tensor | None, "bool [B]"]


class RoomView(NamedTuple):
    """Slots of each head.

    Attributes:
        budget: for neither class tokens nor protected ones.
        cap, capacity: most slots without protected tokens, and all slots.
    """

    budget: Annotated[Tensor, "int32 [B, H]"]
    cap: Annotated[Tensor, "int32 [H]"]
    capacity: Annotated[Tensor, "int32 [H]"]


class RuleView(NamedTuple):
    """How the heads of a layer rank tokens against each other, see evict/keepset.py.

    Attributes:
        bits: class flags that a head keeps (1, 2), ranks the rest by score (4), has room for the
            rest (8), keeps scores (16); see `rule_bits`.
        windows: local windows in tokens.
        first_vote: scalar, first position whose votes counted.
        spans: bounds of protected tokens, counted from a row's first real token; or None.
        vote: ``none``, ``one`` (raw sums and means) or ``index`` (lift).
        mean: whether scores are ranked per vote.
    """

    bits: Annotated[Tensor, "int32 [H]"]
    windows: Annotated[Tensor, "int32 [B, H]"]
    first_vote: Annotated[Tensor, "int64 []"]
    spans: Annotated[Tensor | None, "int32 [B, S, 2]"]
    vote: Annotated[str, "int32 constant"]
    mean: Annotated[bool, "int32 constant"]
    reach: Reach


class HeadsView(NamedTuple):
    """The heads of a layer in the order of its arrays.

    Attributes:
        number: the model's number of each head.
        chunks: first piece of each segment, counted from the layer's first, and their number.
    """

    number: Annotated[Tensor, "int64 [H]"]
    constants: KeyConstants
    chunks: Annotated[Tensor, "int64 [B, H, 2]"]


class PiecesView(NamedTuple):
    """How a group's segments are cut into pieces, one for each program of a kernel.

    Attributes:
        work: first slot, slots, row and head of each, see `tuning.work_list`.
        base: first slot of each segment.
        first_head: the group's first head; first_work: its first piece in the layer.
        longest: slots of the longest piece.
    """

    work: Annotated[Tensor, "int64 [W, 4]"]
    base: Annotated[Tensor, "int64 [B, M]"]
    first_head: Annotated[int, "int32"]
    first_work: Annotated[int, "int32"]
    longest: Annotated[int, "int32 constant"]


class PartsView(NamedTuple):
    """The softmax of every piece of a layer for itself, see `decode_split.reference.Partial`."""

    accumulated: Annotated[Tensor, "float32 [W, G, Dv]"]
    maximum: Annotated[Tensor, "float32 [W, G]"]
    total: Annotated[Tensor, "float32 [W, G]"]


class Combined(NamedTuple):
    """What `decode_combine` gives.

    Attributes:
        out: the layer's output, in the model's order of heads.
        lse: log of the softmax's sum, −inf where nothing is seen.
        exact_logits: of the exact tokens and, last, the token itself.
    """

    out: Annotated[Tensor, "model [B, 1, Hq, Dv]"]
    lse: Annotated[Tensor, "float32 [B, H, G]"]
    exact_logits: Annotated[Tensor, "float32 [B, H, G, E + 1]"]


class Advanced(NamedTuple):
    """What `row_advance` gives.

    Attributes:
        notes: the exact slot that the token takes, and the position (−1: none) and class flags of
            what leaves it.
        granted: slots that a segment may use, its first ones.
    """

    notes: Annotated[Tensor, "int64 [B, 3]"]
    granted: Annotated[Tensor, "int32 [B, H]"]


class Weakest(NamedTuple):
    """What `score_select` gives: of each piece the lowest priority, and the first slot with it.

    Attributes:
        rank: +inf where nothing may be given up, −inf where a slot is free.
    """

    rank: Annotated[Tensor, "float32 [W]"]
    slot: Annotated[Tensor, "int64 [W]"]


class StepView(NamedTuple):
    """What the other kernels of a step found, for `kv_append`."""

    combined: Combined
    advanced: Advanced
    weakest: Weakest


class PromptView(NamedTuple):
    """A prompt, and which of its tokens are kept where.

    Attributes:
        kept: row, KV head and token of each.
        slot: all different.
    """

    key: Annotated[Tensor, "model [B, H, T, D] strided"]
    value: Annotated[Tensor, "model [B, H, T, Dv] strided"]
    kept: Annotated[Tensor, "int64 [3, kept]"]
    slot: Annotated[Tensor, "int64 [kept]"]


class VotersView(NamedTuple):
    """Chosen query rows of a prompt, R of them, and its keys.

    Attributes:
        lse: log of each row's softmax sum over all that it sees.
        position: the last key that a row sees.
        weight: of a row's attention; 0 for padding.
        first: the first key that is no padding.
    """

    query: Annotated[Tensor, "model [B, Hq, R, D] strided"]
    key: Annotated[Tensor, "model [B, H, T, D] strided"]
    lse: Annotated[Tensor, "float32 [B, Hq, R]"]
    position: Annotated[Tensor, "int64 [R]"]
    weight: Annotated[Tensor, "float32 [B, R]"]
    first: Annotated[Tensor, "int64 [B]"]


class Vectors(NamedTuple):
    """A ``strided`` tensor as kernels have it: where it lies, and its strides in elements."""

    data: Annotated[Tensor, "model"]
    row: Annotated[int, "int64"]
    head: Annotated[int, "int64"]
    token: Annotated[int, "int64"]

    @staticmethod
    def of(tensor: Tensor) -> Vectors:
        row, head, token, _ = tensor.stride()
        return Vectors(tensor, row, head, token)


# ---- the tables
class Field(NamedTuple):
    """One line of a view's table.

    Attributes:
        kind: the class of a view, `Tensor`, or int, float, bool or str.
        dtype: of a tensor's or a C field's numbers; empty for a view.
        shape: names of a tensor's axes.
    """

    name: str
    kind: type
    optional: bool
    dtype: str = ""
    shape: tuple[str, ...] = ()
    constant: bool = False
    strided: bool = False


@cache
def fields_of(view: type) -> tuple[Field, ...]:
    """A view's table."""
    hints = get_type_hints(view, include_extras=True)
    return tuple(field_of(name, hint) for name, hint in hints.items())


def field_of(name: str, hint: object) -> Field:
    """What an annotation says of a field, or of an argument of a kernel."""
    table = ""
    if get_origin(hint) is Annotated:
        hint, table = get_args(hint)
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(k for k in kinds if k is not type(None))
    if not isinstance(kind, type):
        kind = str  # a Literal: one of a few words
    if not table:
        return Field(name, kind, len(kinds) > 1)
    found = _TABLE.fullmatch(table)
    assert found is not None, f"{name}: {table!r}"
    dtype, axes, constant, strided = found.groups()
    shape = tuple(axes.split(", ")) if axes else ()
    return Field(name, kind, len(kinds) > 1, dtype, shape, bool(constant), bool(strided))


def leaves(field: Field) -> Iterator[Field]:
    """A field itself, or those of the view in it, named ``exact_k`` for k of exact."""
    if not issubclass(field.kind, tuple):
        yield field
        return
    for inner in fields_of(field.kind):
        yield from leaves(inner._replace(name=f"{field.name}_{inner.name}"))


def flat(values: Iterable[object]) -> list[object]:
    """What `leaves` names, of arguments in order."""
    found: list[object] = []
    for value in values:
        if isinstance(value, tuple):
            found.extend(flat(value))
        else:
            found.append(value)
    return found


def packed(field: Field, values: Iterator[object]) -> object:
    """An argument from the next of its leaves: `flat` undone."""
    if not issubclass(field.kind, tuple):
        return next(values)
    make: Callable[..., object] = field.kind
    return make(*(packed(inner, values) for inner in fields_of(field.kind)))
