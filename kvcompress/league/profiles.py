"""The profiles that the league's plans are solved from, taken once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

from kvcompress.errors import PlanError
from kvcompress.league.scale import keeps_all
from kvcompress.plan import Plan
from kvcompress.profile.candidates import codes_nothing
from kvcompress.profile.run import run
from kvcompress.profile.solve import solve
from kvcompress.profile.store import PARAMS_FILE, Profile
from kvcompress.recipe import BytesPolicy, FastGenPolicy, Recipe

MEASURED: Final = (BytesPolicy, FastGenPolicy)  # policies that read what a profile measured

_NEVER: Final = 1e30  # loss of a head that is not to be chosen


@final
class Profiles:
    """Profiles of one model under `folder`, one for each calibration and keep settings.

    Args:
        given: directory of a finished profile, used where its settings are the ones wanted.
        note: told what is about to be profiled.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        given: Path | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.tokenizer, self.folder, self.note = model, tokenizer, folder, note
        self._kept: dict[str, tuple[Profile, Path]] = {}
        if given is not None:
            profile = Profile.load(given)
            self._kept[_name(measured_recipe(profile.recipe))] = (profile, given)

    def of(self, recipe: Recipe) -> tuple[Profile, Path]:
        """A profile that `recipe` can be solved from, and where it and its constants lie."""
        wanted = measured_recipe(recipe)
        name = _name(wanted)
        if name not in self._kept:
            where = self.folder / name
            keep = wanted.keep
            self.note(
                f"profile for {keep.scorer}, {keep.sink_tokens} sinks, {keep.recent_tokens} recent"
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._kept[name] = (run(self.model, self.tokenizer, wanted, where), where)
        return self._kept[name]

    def base(self) -> tuple[Profile, Path]:
        """The one by the default recipe: its key constants serve every plan."""
        return self.of(Recipe())

    def solve(self, recipe: Recipe) -> Plan:
        """The plan of `recipe`; only policies that read measurements have a profile of their own.

        Raises:
            PlanError: if nothing meets the recipe's target.
        """
        if isinstance(recipe.policy, MEASURED):
            profile, _ = self.of(recipe)
        else:
            base, _ = self.base()
            told = base.recipe.model_copy(update={"keep": recipe.keep})
            profile = base.model_copy(update={"recipe": told})
        return solve(profile, recipe.policy, recipe.keep)

    def solve_bits_only(self, recipe: Recipe) -> Plan:
        """The byte plan of `recipe` in which every token stays, so that only bits are chosen.

        Raises:
            PlanError: if even the fewest bits need more bytes.
        """
        profile, _ = self.of(recipe)
        usable = [
            i for i, head in enumerate(profile.candidates) if head.full or codes_nothing(head)
        ]
        losses = tuple(
            tuple(
                tuple(_NEVER if codes_nothing(profile.candidates[i]) else row[i] for i in usable)
                for row in layer
            )
            for layer in profile.losses
        )
        heads = tuple(profile.candidates[i] for i in usable)
        full = profile.model_copy(update={"candidates": heads, "losses": losses})
        plan = solve(full, recipe.policy, recipe.keep)
        if not keeps_all(plan):
            raise PlanError("every token in the fewest bits needs more bytes")
        return plan

    def params_path(self) -> Path:
        """The key constants of `base`."""
        return self.base()[1] / PARAMS_FILE


def measured_recipe(recipe: Recipe) -> Recipe:
    """What of `recipe` decides the measurements; recipes that agree in it share a profile."""
    policy = recipe.policy
    ratios = {"frequent_ratio", "local_ratio"}
    given = policy.model_dump(include=ratios) if isinstance(policy, FastGenPolicy) else {}
    return Recipe(
        name="league",
        calibration=recipe.calibration,
        keep=recipe.keep,
        policy=FastGenPolicy(kind="fastgen", **given),
    )


def _name(recipe: Recipe) -> str:
    data = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()[:16]
