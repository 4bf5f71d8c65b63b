"""A decode step of one layer in the compiled CPU kernels: attention, scores, eviction and storage
in one call that reads the codes in place.

The rules are those of `store.attend` and `store_token`. These two serve what `refusal` names, every
other device, and an installation without compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, cast, pointer
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.scorers import Scorer
from kvcompress.evict.scorers.attention import LiftScorer, MeanScorer
from kvcompress.evict.scorers.base import PromptScorer
from kvcompress.kernels.cpu import layout
from kvcompress.kernels.cpu.library import Library, library, why_not
from kvcompress.kernels.view import CodesView, ExactView, GroupView, KeyConstants
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.segments import Group
from kvcompress.runtime.store.state import LayerSettings, LayerState

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Voting:
    """What a scorer does in a decode step, as the kernel knows it."""

    vote: int
    per_vote: bool
    newest: bool

    @staticmethod
    def of(scorer: Scorer) -> Voting | None:
        """None for a scorer that asks for more than weighted sums of attention."""
        if not scorer.adds_up:
            return None
        known: tuple[type[Scorer], ...] = (Scorer, MeanScorer, LiftScorer, PromptScorer)

        def of_known(name: str) -> type[Scorer] | None:
            return next((k for k in known if getattr(k, name) is scorer.runs(name)), None)

        weight, rank, initial = map(of_known, ("row_weight", "rank", "initial"))
        if weight is None or rank is None or initial is None:
            return None
        votes = {Scorer: layout.VOTE, LiftScorer: layout.LIFT, PromptScorer: layout.NO_VOTE}
        vote = votes[weight] if scorer.uses_attention else layout.NO_VOTE
        return Voting(vote, rank is MeanScorer, initial is PromptScorer)


# what of a cache or a step the kernels do not serve, whatever the plan
EXCEPTIONS: Final[dict[str, Callable[[LayerState, Tensor], bool]]] = {
    "a cache with protected spans": lambda state, query: any(state.spans),
    "a layer on another device than the CPU": lambda state, query: query.device.type != "cpu",
    "queries and keys of other or different dtypes": lambda state, query: (
        query.dtype not in _DTYPES or query.dtype != state.exact_k.dtype
    ),
    f"more than {layout.MAX_ROWS} query heads for a KV head": lambda state, query: (
        query.shape[1] > layout.MAX_ROWS * state.exact_k.shape[1]
    ),
}


def refusal(
    settings: LayerSettings, state: LayerState | None = None, query: Tensor | None = None
) -> str | None:
    """Why the compiled kernels do not decode a layer, None where they do: the gate of every step.

    Args:
        state, query: what the layer holds and the query ``[B, Hq, 1, D]`` of a step; None asks
            whether the kernels are there and serve the plan, `EXCEPTIONS` aside.
    """
    if library() is None:
        return why_not()
    shape = settings.plan.model
    reasons = {
        f"{settings.kind} layers": settings.kind not in ("full", "sliding", "chunked"),
        "a recall tier": settings.plan.recalls(settings.layer),
        "layers whose keys others read": len(settings.readers) > 1,
        "relative positions": settings.relative,
        "a storage without a kernel": any(
            not {kind.k_dtype, kind.v_dtype} <= layout.STORED for kind, _ in settings.groups
        ),
        "turn quotas": settings.plan.turn_tokens > 0,
        "budgets that follow a threshold": settings.keep_if_above is not None,
        f"vectors of more than {layout.MAX_DIM} channels": max(shape.head_dim, shape.v_dim)
        > layout.MAX_DIM,
        f"the scorer {settings.plan.scorer!r}": any(kind.scored for kind, _ in settings.groups)
        and Voting.of(settings.scorer) is None,
    }
    if state is not None and query is not None:
        reasons |= {reason: applies(state, query) for reason, applies in EXCEPTIONS.items()}
    return next((reason for reason, applies in reasons.items() if applies), None)


def fused_step(settings: LayerSettings) -> FusedStep | None:
    """The compiled step of a layer, None where the gate refuses its plan."""
    return FusedStep(settings) if refusal(settings) is None else None


class FusedStep:
    """The kernel's view of one layer's state; made anew when the state's tensors change."""

    def __init__(self, settings: LayerSettings) -> None:
        self._settings = settings
        self._voting = Voting.of(settings.scorer) or Voting(layout.NO_VOTE, False, False)
        self._asked: tuple[object, ...] = ()  # what the gate was asked last, and its answer
        self._serves = False
        self._seen: list[Tensor | None] = []
        self._view: _View | None = None

    def __getstate__(self) -> dict[str, object]:
        """A copy and a pickle go with other tensors, so they make a view of their own."""
        return {**self.__dict__, "_asked": (), "_seen": [], "_view": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def serves(self, state: LayerState, query: Tensor) -> bool:
        """Whether the gate lets a step pass. It is asked again only when what it looks at changes:
        a state keeps its dtype and device."""
        asked = (query.dtype, query.device, query.shape[1], state.spans)
        if asked != self._asked:
            self._asked = asked
            self._serves = refusal(self._settings, state, query) is None
        return self._serves

    def run(self, state: LayerState, token: Chunk) -> Tensor:
        """Attend, raise scores, and take the token in; `store_token` in all that it leaves.

        Returns:
            ``[B, 1, Hq, Dv]`` contiguous, in the query's dtype.
        """
        kernels = library()
        assert kernels is not None
        state.row_seen = [seen + 1 for seen in state.row_seen]
        queries = token.query.shape[1] // token.key.shape[1]
        state.grow(self._leaving_flags(kernels, state, queries))
        view = self._current(state, queries)
        out = token.query.new_empty(state.batch, 1, token.query.shape[1], token.value.shape[-1])
        step = self._step(state, view, token, out)
        if any(group.store.notes is not None for group in state.groups):
            step.what = layout.ATTEND
            kernels.decode(view.layer, step)
            view.note_victims(state)
            step.what = layout.STORE
        kernels.decode(view.layer, step)
        return out

    def _leaving_flags(self, kernels: Library, state: LayerState, queries: int) -> list[int]:
        """Class flags of the token that leaves the recent ones in each row."""
        if state.exact_class is None:
            return []
        rows = c_int32 * state.batch
        flags = rows()
        kernels.leaving(self._current(state, queries).layer, rows(), flags)
        return list(flags)

    def _current(self, state: LayerState, queries: int) -> _View:
        held = _tensors(state)
        same = len(held) == len(self._seen) and all(map(_is, held, self._seen))
        if self._view is None or not same:
            self._seen, self._view = held, _View(state, queries)
        return self._view

    def _step(self, state: LayerState, view: _View, token: Chunk, out: Tensor) -> layout.StepStruct:
        query, key, value = (_rows(t) for t in (token.query, token.key, token.value))
        if not view.fits(query, key, value):
            shapes = [tuple(t.shape) for t in (query, key, value)]
            raise ValueError(f"query, key and value {shapes} of a token, in {query.dtype}")
        flags = None if token.flags is None else token.flags.contiguous()
        sinks = None if token.sinks is None else token.sinks.float().contiguous()
        view.alive = [query, key, value, out, flags, sinks]
        step, softmax = view.step, view.softmax
        for told, t in zip(view.vectors, (query, key, value), strict=True):
            told.data = t.data_ptr()
            told.row, told.head, told.token, _ = t.stride()
        view.token.flags = None if flags is None else flags.data_ptr()
        softmax.scaling, softmax.softcap = token.scaling, token.softcap or 0.0
        softmax.sinks = None if sinks is None else sinks.data_ptr()
        step.out = out.data_ptr()
        step.position, step.first_vote = token.position, state.first_vote
        voting = self._voting
        step.vote, step.per_vote, step.newest = voting.vote, voting.per_vote, voting.newest
        step.what = layout.ATTEND | layout.STORE
        step.threads = torch.get_num_threads()
        return step


def _is(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b


def _rows(t: Tensor) -> Tensor:
    """``[B, H, 1, D]`` with dense vectors."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _tensors(state: LayerState) -> list[Tensor | None]:
    """Every tensor whose address the kernel is told."""
    held = [state.exact_k, state.exact_v, state.exact_position, state.exact_class, state.start]
    for group in state.groups:
        store = group.store
        held += [store.keys.data, store.values.data, store.position, store.score]
        held += [group.recent_score, group.windows, group.rules.classes]
    return held


class _View:
    """A state as the kernel's structures; it keeps alive what they point to."""

    def __init__(self, state: LayerState, queries: int) -> None:
        self.alive: list[Tensor | None] = []
        center, scale = state.key_constants()
        self._constants = KeyConstants(center.contiguous(), scale.contiguous())
        self._groups = (layout.GroupStruct * len(state.groups))()
        self._keeps = (layout.KeepStruct * len(state.groups))()
        for number, group in enumerate(state.groups):
            self._groups[number] = _group(state, group)
            self._keeps[number] = _keep(state, group)
        segments = [
            (capacity, number, row, member)
            for number, group in enumerate(state.groups)
            for row, line in enumerate(group.store.capacities)
            for member, capacity in enumerate(line)
        ]
        segments.sort(key=lambda s: -s[0])
        self._segments = (layout.SegmentStruct * len(segments))()
        for place, (capacity, number, row, member) in enumerate(segments):
            group = state.groups[number]
            start = group.store.starts[row][member]
            head = group.heads[member]
            self._segments[place] = layout.SegmentStruct(number, row, head, member, start, capacity)
        self._victim = (c_int64 * len(segments))()
        self._own_score = (c_float * len(segments))()
        self.layer = self._layer(state, queries)
        self.step = layout.StepStruct()
        self.step.victim = cast(self._victim, POINTER(c_int64))
        self.step.own_score = cast(self._own_score, POINTER(c_float))
        self.token, self.softmax = self.step.token, self.step.softmax
        self.vectors = (self.token.query, self.token.key, self.token.value)

    def _layer(self, state: LayerState, queries: int) -> layout.LayerStruct:
        settings, exact_k = state.settings, state.exact_k
        batch, heads, held, dim = exact_k.shape
        value_dim, model = state.exact_v.shape[-1], str(exact_k.dtype)[6:]
        exact = ExactView(
            *(exact_k, state.exact_v, state.exact_position, state.exact_class),
            settings.sink_tokens,
        )
        axes = {"B": batch, "H": heads, "E": held, "D": dim, "Dv": value_dim}
        self._fits = (
            (exact_k.dtype, (batch, heads * queries, 1, dim)),
            (exact_k.dtype, (batch, heads, 1, dim)),
            (exact_k.dtype, (batch, heads, 1, value_dim)),
        )
        return layout.LayerStruct(
            *(batch, heads, queries, dim, value_dim, held, layout.DTYPES[model]),
            layout.pack(layout.ExactStruct, exact, model, **axes),
            layout.pack(layout.ConstantsStruct, self._constants, model, **axes),
            layout.ReachStruct(settings.window or 0, settings.block or 0),
            layout.address(state.start, "int32", batch),
            *map(pointer, (self._groups[0], self._keeps[0], self._segments[0])),
            len(self._segments),
        )

    def fits(self, *vectors: Tensor) -> bool:
        """Whether query, key and value of a token are of this layer's dtype and shape."""
        return tuple((t.dtype, t.shape) for t in vectors) == self._fits

    def note_victims(self, state: LayerState) -> None:
        """Let the stores note what is about to be overwritten."""
        for number, group in enumerate(state.groups):
            slots = [
                slot
                for slot, segment in zip(self._victim, self._segments, strict=True)
                if segment.group == number and slot >= 0
            ]
            if slots:
                group.store.note(torch.tensor(slots, device=state.start.device))


def _group(state: LayerState, group: Group) -> layout.GroupStruct:
    store, kind = group.store, group.store.kind
    batch, members, slots = state.batch, len(group.heads), store.position.shape[0]
    if sorted(len(line) for line in store.capacities) != [members] * batch:
        raise ValueError(f"capacities of {batch} rows and {members} heads: {store.capacities}")
    if not all(0 <= head < state.exact_k.shape[1] for head in group.heads):
        raise ValueError(f"heads {group.heads} of {state.exact_k.shape[1]}")
    pairs = zip(store.starts, store.capacities, strict=True)
    layout.check_segments([own for pair in pairs for own in zip(*pair, strict=True)], slots)
    if {store.score is not None, group.recent_score is not None} != {kind.scored}:
        raise ValueError(f"scores of a group with {kind}")
    view = GroupView(
        CodesView.of(store.keys, kind.k_dtype, store.head_dim),
        CodesView.of(store.values, kind.v_dtype, store.value_dim),
        store.position,
        store.score,
        group.recent_score,
    )
    axes = {"N": slots, "Ns": slots, "B": batch, "Ms": members, "R": state.settings.recent_tokens}
    return layout.pack(layout.GroupStruct, view, str(state.exact_k.dtype)[6:], **axes)


def _keep(state: LayerState, group: Group) -> layout.KeepStruct:
    rules, batch, members = group.rules, state.batch, len(group.heads)
    by_row = rules.classes.ndim == 2
    own = (batch, members) if by_row else (members,)
    return layout.KeepStruct(
        layout.address(group.windows, "int32", batch, members),
        layout.address(rules.classes, "int64", *own),
        layout.address(rules.by_score, "bool", *own),
        layout.address(rules.keeps_rest, "bool", *own),
        members if by_row else 0,
        members,
    )
