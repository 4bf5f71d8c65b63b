"""The profiles that the league's plans are solved from, taken once and kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.league.scale import keeps_all
from kvcompress.plan import Plan
from kvcompress.profile.candidates import codes_nothing
from kvcompress.profile.run import run
from kvcompress.profile.solve import solve
from kvcompress.profile.store import PARAMS_FILE, Profile
from kvcompress.recipe import Calibration, FastGenPolicy, Keep, Part, Recipe, reads_profile
from kvcompress.runtime.model.families import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_CALIBRATION: Final = Calibration()
_LEAGUE_PARTS: Final[tuple[Part, ...]] = ("losses", "heads")  # beside the recovery of FastGen
_NEVER: Final = 1e30  # loss of a head that is not to be chosen


@final
class Profiles:
    """Profiles of one model under `folder`, one for each calibration and keep settings.

    Args:
        given: directory of a finished profile, used where its settings are the ones wanted.
        calibration: of the constants that every plan shares.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        given: Path | None = None,
        calibration: Calibration = DEFAULT_CALIBRATION,
    ) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.calibration = calibration
        self.max_position = shape_of(model.config, model.dtype).max_position
        self._kept: dict[str, tuple[Profile, Path]] = {}
        if given is not None:
            profile = Profile.load(given)
            self._kept[_name(measured_recipe(profile.recipe))] = (profile, given)

    def of(self, recipe: Recipe) -> tuple[Profile, Path]:
        """A profile that `recipe` can be solved from, and where it and its constants lie."""
        wanted = within(measured_recipe(recipe), self.max_position)
        name = _name(wanted)
        if name not in self._kept:
            where = self.folder / name
            self.folder.mkdir(parents=True, exist_ok=True)
            profile = run(self.model, self.tokenizer, wanted, where, also=_LEAGUE_PARTS)
            self._kept[name] = (profile, where)
        return self._kept[name]

    def base(self) -> tuple[Profile, Path]:
        """The one whose key constants serve every plan."""
        return self.of(constants_recipe("lift", self.calibration))

    def solve(self, recipe: Recipe) -> Plan:
        """The plan of `recipe`; only policies that read measurements have a profile of their own.

        Raises:
            PlanError: if nothing meets the recipe's target.
        """
        if reads_profile(recipe.policy):
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

    def params_path(self, scorer_name: str) -> Path:
        """The key constants, with what the profiler trains for the scorer, if it does."""
        return self.of(constants_recipe(scorer_name, self.calibration))[1] / PARAMS_FILE


def constants_recipe(scorer_name: str, calibration: Calibration) -> Recipe:
    """The recipe whose profile has the constants that a plan with this scorer needs."""
    # who votes changes no constant: said as the shipped recipes say it, which then share a profile
    trained = Keep(scorer=scorer_name)
    keep = trained if scorer(scorer_name).trained else Keep(score_rows=None)
    return Recipe(calibration=calibration, keep=keep)


def within(recipe: Recipe, max_position: int) -> Recipe:
    """`recipe` with calibration prompts that the model has positions for."""
    tokens = min(recipe.calibration.tokens, max_position)
    calibration = recipe.calibration.model_copy(update={"tokens": tokens})
    return recipe.model_copy(update={"calibration": calibration})


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
