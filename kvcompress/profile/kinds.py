"""What a calibration prompt asks of a model, and what to say where none looks far back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["notes", "facts", "code", "chat", "quote", "text", "own"]
RECALL: Final[tuple[Kind, ...]] = ("notes", "facts", "code", "chat", "quote")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One calibration prompt.

    Attributes:
        kind: ``own`` is the user's, ``text`` our plain prose and code; the others end in questions
            about what stands far above.
    """

    ids: list[int]
    kind: Kind

    @property
    def recalls(self) -> bool:
        """Whether its measured rows are known to need what stands far above them."""
        return self.kind in RECALL


def far_back_note(prompts: Sequence[Prompt]) -> str:
    """What to tell a user whose prompts all look at what is near; empty where some look far back.

    Without such prompts every head seems to do with a window, whatever it does on other data.
    """
    if any(prompt.recalls for prompt in prompts):
        return ""
    counts = Counter(prompt.kind for prompt in prompts)
    words = {"own": "of your own data", "text": "of plain text"}
    there = ", ".join(f"{count} {words[kind]}" for kind, count in sorted(counts.items()))
    return (
        f"no calibration prompt is known to need what stands far above ({there}), so the heads "
        "that look far back may seem to lose nothing; -d FILE alone, or --mix recall=0.5 beside "
        "yours, adds prompts that do"
    )
