"""Who takes part: each recipe as an entry with a role, and why a recipe does not take part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

from kvcompress.errors import RecipeError
from kvcompress.league.quantized import QUANTIZED, QuantizedCacheSettings
from kvcompress.plan import HeadPlan, KVDtype, StrictModel
from kvcompress.recipe import BytesPolicy, FastGenPolicy, Recipe, UniformPolicy

# reference: transformers' own 16-bit cache. quantization: every token kept, in fewer bits.
# recall: every token kept, most of them in host memory; shown beside the others, not ranked.
# baseline: sinks and recent tokens, random, key norm. published: one eviction system. planned:
# tokens and bits together under a byte target. part: the same planner with one of the two alone.
# own: at the bytes that its own rule takes, not ranked.
Role = Literal[
    "reference", "quantization", "baseline", "published", "planned", "part", "recall", "own"
]
Storage = Literal["int8", "int4", "recipe"]
STORAGES: Final[tuple[Storage, ...]] = get_args(Storage)

REFERENCE: Final = "full cache"
BASELINES: Final = frozenset({"sink-recent", "random", "random-keep-prompt", "key-norm"})
PLANNED: Final = "planned"  # byte plans that differ in their size alone
TOKENS_ONLY: Final = "tokens-only"
BITS_ONLY: Final = "bits-only"
# for the planner that chooses tokens alone: int8 buys it 1.8 times the tokens of 16 bits
_TOKENS_DTYPES: Final[tuple[tuple[KVDtype, KVDtype], ...]] = (("int8", "int8"),)
_ORDER: Final[tuple[Role, ...]] = (
    "reference",
    "planned",
    "baseline",
    "quantization",
    "part",
    "recall",
    "own",
    "published",
)


class Entry(StrictModel):
    """One row of the league.

    Attributes:
        recipe: with the league's storage; None for the reference and for `quantized`.
        quantized: transformers' QuantizedCache in the place of a plan.
        bits_only: the planner may choose bits, and every token stays.
        same_as: further recipes that come to the same thing in the league.
    """

    name: str
    role: Role
    description: str
    recipe: Recipe | None = None
    quantized: QuantizedCacheSettings | None = None
    bits_only: bool = False
    same_as: tuple[str, ...] = ()


class Skipped(StrictModel):
    """A recipe, or another way to hold the cache, that did not run."""

    name: str
    reason: str


def read_recipes(folder: Path) -> list[Recipe]:
    """Every ``*.yaml`` in `folder`, by name.

    Raises:
        RecipeError: if there is none, or with the problems of all that cannot be read.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{folder}: no *.yaml in it; give a folder of recipes with --recipes")
    recipes, problems = [], []
    for path in paths:
        try:
            recipes.append(Recipe.load(path))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("; ".join(problems))
    return recipes


def quantized_entries() -> list[Entry]:
    """transformers' QuantizedCache in each of its settings; the league finds out which run here."""
    return [
        Entry(
            name=name,
            role="quantization",
            description=settings.description(),
            quantized=settings,
        )
        for name, settings in QUANTIZED.items()
    ]


def make_entries(
    recipes: Sequence[Recipe], storage: Storage = "int8", others: Sequence[Entry] = ()
) -> tuple[list[Entry], list[Skipped]]:
    """The entries in the order in which they run, the reference first, and the recipes left out.

    Recipes that differ only in their byte target, name, text or kind of weights are one entry.

    Args:
        storage: what tokens are stored in where an evictor's recipe leaves them in 16 bits;
            ``recipe`` leaves them there. Recipes that name a code keep it.
        others: entries without a recipe.
    """
    entries = [Entry(name=REFERENCE, role="reference", description="transformers' DynamicCache")]
    skipped = []
    places: dict[str, int] = {}
    for recipe in sorted(recipes, key=lambda each: each.weights != "bf16"):
        role = role_of(recipe)
        wanted = (
            recipe if role in ("quantization", "planned", "recall") else stored_in(recipe, storage)
        )
        key = _what_counts(wanted)
        if key in places:
            first = entries[places[key]]
            if recipe.weights != "bf16":
                reason = f"the league compares KV caches; that of this recipe is {first.name}'s"
                skipped.append(Skipped(name=recipe.name, reason=reason))
                continue
            entries[places[key]] = _joined(first, recipe)
            continue
        places[key] = len(entries)
        entries.append(
            Entry(name=recipe.name, role=role, description=recipe.description, recipe=wanted)
        )
    entries += [part for entry in entries for part in _parts(entry)]
    entries += others
    return sorted(entries, key=lambda entry: _ORDER.index(entry.role)), skipped


def _joined(first: Entry, twin: Recipe) -> Entry:
    """`first` with a recipe that comes to the same; byte plans lose the name of their one size."""
    same = (*first.same_as, twin.name)
    if first.role != "planned" or first.name == PLANNED:
        return first.model_copy(update={"same_as": same})
    told = "keep-set, tokens and bits of every head, chosen for the bytes of the column"
    return first.model_copy(
        update={"name": PLANNED, "description": told, "same_as": (first.name, *same)}
    )


def role_of(recipe: Recipe) -> Role:
    policy = recipe.policy
    if isinstance(policy, BytesPolicy):
        return "planned"
    if recipe.name in BASELINES:
        return "baseline"
    if recipe.keep.recall is not None:
        return "recall"
    if isinstance(policy, UniformPolicy) and policy.head.full:
        return "quantization"
    return "published"


def stored_in(recipe: Recipe, storage: Storage) -> Recipe:
    """`recipe` with `storage` in the place of the model's own 16 bits."""
    if storage == "recipe":
        return recipe
    code: KVDtype = storage

    def dtypes(value: HeadPlan | FastGenPolicy) -> dict[str, KVDtype]:
        names = ("k_dtype", "v_dtype")
        return {name: code for name in names if getattr(value, name) == "model"}

    policy = recipe.policy
    if isinstance(policy, UniformPolicy):
        head = policy.head.model_copy(update=dtypes(policy.head))
        new: object = policy.model_copy(update={"head": head})
    elif isinstance(policy, FastGenPolicy) or hasattr(policy, "k_dtype"):
        new = policy.model_copy(update=dtypes(policy))  # type: ignore[arg-type]
    else:
        return recipe
    return recipe.model_copy(update={"policy": new})


def choose(entries: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """The reference and the entries that `only` names, by name, role or the name of a twin.

    Raises:
        RecipeError: for a name that is none of them.
    """
    if not only:
        return list(entries)
    known = {word for entry in entries for word in (entry.name, entry.role, *entry.same_as)}
    wrong = sorted(set(only) - known)
    if wrong:
        raise RecipeError(
            f"--only {', '.join(wrong)}: no such entry; choose from {', '.join(sorted(known))}"
        )

    def named(entry: Entry) -> bool:
        return bool({entry.name, entry.role, *entry.same_as} & set(only))

    return [entry for entry in entries if entry.role == "reference" or named(entry)]


def _parts(entry: Entry) -> list[Entry]:
    """The planner of `entry` with one of its two freedoms."""
    recipe = entry.recipe
    if recipe is None or not isinstance(recipe.policy, BytesPolicy):
        return []
    tokens = recipe.policy.model_copy(update={"dtypes": _TOKENS_DTYPES})
    return [
        Entry(
            name=f"{entry.name} {TOKENS_ONLY}",
            role="part",
            description=f"{entry.name}'s planner choosing tokens alone, all in int8",
            recipe=recipe.model_copy(update={"policy": tokens}),
        ),
        Entry(
            name=f"{entry.name} {BITS_ONLY}",
            role="part",
            description=f"{entry.name}'s planner choosing bits alone, every token kept",
            recipe=recipe,
            bits_only=True,
        ),
    ]


def _what_counts(recipe: Recipe) -> str:
    """A recipe without what the league replaces."""
    data = recipe.model_dump(mode="json", exclude={"name", "description", "weights"})
    for name in ("keep_ratio", "memory", "context", "batch"):
        data["policy"].pop(name, None)
    return json.dumps(data, sort_keys=True)
