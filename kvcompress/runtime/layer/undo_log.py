"""Taking decoded tokens back, so that a rejected draft leaves no trace.

Each drafted token is attended and stored like a token that was really decoded, so a draft evicts
exactly what decoding would have evicted; the log remembers what each token overwrote.
Speculative decoding then gives the same tokens as plain decoding, with eviction too.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields

from torch import Tensor

from kvcompress.runtime.store.segments import Overwritten
from kvcompress.runtime.store.state import LayerState


@dataclass(slots=True)
class _Undo:
    """What storing one token changed, except for what the stores note themselves.

    Attributes:
        exact: place ``[B]`` among the exact slots, and their key, value, position and class there.
        scores, recent: per group, None where it keeps none.
    """

    exact: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    scores: list[Tensor | None]
    recent: list[Tensor | None]
    capacities: list[list[list[int]]]
    row_seen: list[int]
    class_counts: list[list[int]]
    granted: list[list[int]]
    notes: list[list[Overwritten]]


@dataclass(slots=True)
class UndoLog:
    """Tokens that may still be taken back, oldest first: an `_Undo`, or a copy of the state."""

    entries: list[_Undo | LayerState] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def before_token(self, state: LayerState) -> None:
        """Remember the state; `store_token` then notes what it overwrites."""
        row, place = state.rows(), state.oldest_recent()
        scores, recent = [], []
        notes: list[list[Overwritten]] = []
        for group in state.groups:
            scores.append(None if group.store.score is None else group.store.score.clone())
            recent.append(None if group.recent_score is None else group.recent_score.clone())
            group.store.notes = []
            notes.append(group.store.notes)
        flags = state.exact_class
        self.entries.append(
            _Undo(
                (
                    place,
                    state.exact_k[row, :, place],
                    state.exact_v[row, :, place],
                    state.exact_position[row, place],
                    None if flags is None else flags[row, place],
                ),
                scores,
                recent,
                [[list(line) for line in group.store.capacities] for group in state.groups],
                list(state.row_seen),
                [list(counts) for counts in state.class_counts],
                [list(row) for row in state.granted],
                notes,
            )
        )

    def before_prompt(self, state: LayerState) -> None:
        """Remember all of a state that is about to be laid out anew; it is still small."""
        self.entries.append(deepcopy(state))

    def forget_all_but(self, count: int) -> None:
        """Only the newest `count` tokens can be taken back from now on."""
        del self.entries[: max(0, len(self.entries) - count)]

    @staticmethod
    def stop_notes(state: LayerState) -> None:
        for group in state.groups:
            group.store.notes = None

    def undo(self, state: LayerState) -> None:
        """Take the newest token back."""
        entry = self.entries.pop()
        if isinstance(entry, LayerState):
            for item in fields(LayerState):
                setattr(state, item.name, getattr(entry, item.name))
            return
        for number, group in enumerate(state.groups):
            for note in reversed(entry.notes[number]):
                group.store.restore(note)
            if group.store.capacities != entry.capacities[number]:
                group.store.relayout(entry.capacities[number])
            if entry.scores[number] is not None:
                group.store.score = entry.scores[number]
            group.recent_score = entry.recent[number]
        place, key, value, position, flags = entry.exact
        row = state.rows()
        state.exact_k[row, :, place], state.exact_v[row, :, place] = key, value
        state.exact_position[row, place] = position
        if state.exact_class is not None and flags is not None:
            state.exact_class[row, place] = flags
        state.row_seen, state.class_counts = entry.row_seen, entry.class_counts
        state.granted = entry.granted
