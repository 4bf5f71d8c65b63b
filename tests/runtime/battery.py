"""What is measured of each family: V1 against DynamicCache, V2 against the oracle, V7 and V8.

`test_families.py` holds a part of it in the default tier; `tools/parity.py` prints all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel

import kvcompress
from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.runtime import oracle, ways
from tests.runtime.models import build, prompts
from tests.runtime.ways import DTYPES, LENGTH, PADS, WAYS, Results, Subject, forced

EXACT: Final[dict[str, Any]] = {"k_dtype": "model", "v_dtype": "model"}
FULL: Final = HeadPlan(full=True, **EXACT)
PUNCT, SPECIAL = tuple(range(5, 13)), (30, 31, 32, 33)
# float32 sums in another order; weights are sharpened, so logits reach 8
BAR: Final = 1e-5
# error against float32, in units of the error that DynamicCache makes in the same dtype
DTYPE_BAR: Final = 1.25

# budgets that no prompt of the battery reaches
WIDE: Final = (
    FULL,
    HeadPlan(frequent=Budget(tokens=500), **EXACT),
    HeadPlan(local=Budget(tokens=500), **EXACT),
    HeadPlan(punct=True, special=True, frequent=Budget(tokens=500), cap=900, **EXACT),
)
KEEP_SETS: Final[dict[str, tuple[HeadPlan, ...]]] = {
    "sink": (HeadPlan(**EXACT),),
    "local": (HeadPlan(local=Budget(tokens=12), **EXACT),),
    "punct": (HeadPlan(special=True, punct=True, **EXACT),),
    "special": (HeadPlan(special=True, **EXACT),),
    "frequent": (HeadPlan(frequent=Budget(tokens=9), **EXACT),),
    "mixed": (
        HeadPlan(frequent=Budget(ratio=0.1), local=Budget(ratio=0.2), punct=True, **EXACT),
        HeadPlan(local=Budget(tokens=12), **EXACT),
        HeadPlan(frequent=Budget(tokens=9), special=True, **EXACT),
        HeadPlan(punct=True, **EXACT),
        FULL,
    ),
    "cap": (
        HeadPlan(special=True, punct=True, local=Budget(tokens=9), cap=6, **EXACT),
        HeadPlan(punct=True, frequent=Budget(tokens=6), cap=8, **EXACT),
        HeadPlan(special=True, cap=2, **EXACT),
    ),
}
# the rest of V2: what a keep-set does over several forwards
TWO_TURNS: Final = (20, 8, *[1] * 6, 9, *[1] * 5, 7, *[1] * 4)
PROTECT: Final = [[(3, 9), (20, 24)], [(0, 2), (12, 15)]]


@dataclass(frozen=True)
class Case:
    """One column of V2.

    Attributes:
        schedule: lengths of the forwards, see `oracle.feed`.
        settings: further fields of the plan.
    """

    heads: tuple[HeadPlan, ...]
    schedule: Sequence[int] | None = None
    protect: Any = ()
    settings: tuple[tuple[str, Any], ...] = ()


CASES: Final[dict[str, Case]] = {
    **{name: Case(heads) for name, heads in KEEP_SETS.items()},
    "forwards": Case(KEEP_SETS["mixed"], TWO_TURNS),
    "protect": Case(KEEP_SETS["mixed"], TWO_TURNS, PROTECT),
    "protect+cap": Case(KEEP_SETS["cap"], TWO_TURNS, [(2, 8), (25, 30)]),
    "turns": Case(KEEP_SETS["mixed"], TWO_TURNS, (), (("turn_tokens", 4),)),
    "turns+protect": Case(
        (*KEEP_SETS["cap"], *KEEP_SETS["frequent"]), TWO_TURNS, PROTECT, (("turn_tokens", 3),)
    ),
}

DRAFTED: Final = ("lookup", "assistant")
HELD: Final = "after_prefill"
TABLES: Final[dict[str, tuple[str, ...]]] = {
    "V1": (*WAYS, *DTYPES),
    "V2": tuple(CASES),
    "V7, V8": (*DRAFTED, HELD),
}

# (family, way): what the refusal says, where one is expected
REFUSALS: Final[dict[tuple[str, str], str]] = {
    ("qwen3_next", way): "not supported with stateful models" for way in DRAFTED
}


@dataclass(frozen=True)
class Outcome:
    """One figure of a table.

    Attributes:
        error: infinite where tokens differ, NaN where nothing was measured.
        bar: what the error may be.
        note: why nothing was measured.
        expected: whether that is known and documented.
        dropped: (token, head) pairs that were evicted on the way, in V2.
        moved: how far that moved the logits; V2 says nothing where this is small.
    """

    error: float
    bar: float = BAR
    note: str = ""
    expected: bool = False
    dropped: int = 0
    moved: float = math.inf

    @property
    def passed(self) -> bool:
        return self.expected if self.note else self.error <= self.bar and self.moved > 1e4 * BAR


def measure(table: str, family: str, column: str) -> Outcome:
    """The figure of one cell of `TABLES`."""
    if table == "V2":
        return measure_v2(family, column)
    if table != "V1":
        return measure_v8(family) if column == HELD else measure_v7(family, column)
    return measure_dtype(family, column) if column in DTYPES else measure_v1(family, column)


def plan_for(model: PreTrainedModel, *heads: HeadPlan, **settings: Any) -> Plan:
    """`heads` in turn over layers and KV heads, neighbours always different."""
    shape = shape_of(model.config, model.dtype)
    settings = {
        "sink_tokens": 2,
        "recent_tokens": 5,
        "punct_ids": PUNCT,
        "special_ids": SPECIAL,
        "scorer": "lift",
        **settings,
    }
    plan = uniform(shape, FULL, **settings)
    rows = tuple(
        tuple(heads[(layer + h) % len(heads)] for h in range(shape.heads_of(layer)))
        for layer in range(shape.layers)
    )
    return plan.model_copy(update={"heads": rows})


def plain_subject(family: str, dtype: torch.dtype = torch.float32) -> Subject:
    model = build(family, dtype=dtype)
    return Subject(family, model, lambda: DynamicCache(config=model.config), DynamicCache)


def served_subject(
    family: str,
    *heads: HeadPlan,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Subject:
    """The same model on a compressed cache."""
    model = build(family, dtype=dtype)
    attach(model, plan_for(model, *heads, **settings))
    return Subject(family, model, lambda: kvcompress.new_cache(model), CompressedCache)


def difference(got: Results, expected: Results) -> float:
    """Largest difference of the logits; infinite where tokens, shapes or counts differ."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return math.inf
    largest = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if not ours.is_floating_point():
            largest = largest if torch.equal(ours, theirs) else math.inf
        else:
            gap = (ours.float() - theirs.float()).abs().nan_to_num(math.inf)
            largest = max(largest, float(gap.max()))
    return largest


def _or_refusal(family: str, way: str, measured: Callable[[], float], bar: float = BAR) -> Outcome:
    """The figure, or what refused to give one."""
    try:
        return Outcome(measured(), bar)
    except (KVCompressError, ValueError, NotImplementedError) as error:
        words = REFUSALS.get((family, way))
        who = "kvcompress" if isinstance(error, KVCompressError) else "transformers"
        expected = words is not None and words in str(error)
        return Outcome(math.nan, bar, f"{who} refuses: {error}", expected)


def measure_v1(family: str, way: str, heads: Sequence[HeadPlan] = WIDE) -> Outcome:
    """A budget beyond the context against DynamicCache."""
    ours, theirs = WAYS[way]

    def measured() -> float:
        return difference(ours(served_subject(family, *heads)), theirs(plain_subject(family)))

    return _or_refusal(family, way, measured)


def measure_dtype(family: str, name: str) -> Outcome:
    """Error against float32 with the same weights, in units of DynamicCache's error: the median
    over forwards, because one that routes a token to another expert says nothing of a cache."""
    dtype = DTYPES[name]

    def measured() -> float:
        rounded = build(family, dtype=dtype).float()
        new_cache = partial(DynamicCache, config=rounded.config)
        exact = torch.stack(forced(Subject(family, rounded, new_cache, DynamicCache)))

        def error(subject: Subject) -> float:
            got = torch.stack(forced(subject)).float()
            return float((got - exact).abs().mean(-1).median())

        return error(served_subject(family, *WIDE, dtype=dtype)) / error(
            plain_subject(family, dtype)
        )

    return _or_refusal(family, name, measured, DTYPE_BAR)


def measure_v2(family: str, name: str) -> Outcome:
    """Dropping tokens against hiding them from a model that keeps everything."""
    case = CASES[name]
    schedule = case.schedule or (LENGTH, *[1] * 11)
    ids = prompts(2, sum(schedule) + 1, PADS[:2])
    inputs = {key: value[:, : schedule[0]] for key, value in ids.items()}
    tokens = ids["input_ids"][:, schedule[0] :]
    model = build(family)
    plan = plan_for(model, *case.heads, **dict(case.settings))
    full = oracle.feed(model, DynamicCache(config=model.config), inputs, tokens, schedule)
    expected, dropped = oracle.run(model, plan, inputs, tokens, case.protect, schedule)

    def measured() -> float:
        attach(model, plan)
        cache = kvcompress.new_cache(model, protect=case.protect)
        return difference([oracle.feed(model, cache, inputs, tokens, schedule)], [expected])

    outcome = _or_refusal(family, name, measured)
    return replace(outcome, dropped=dropped, moved=difference([expected], [full]))


def measure_v7(family: str, way: str) -> Outcome:
    """A drafted generation against a plain one, both under a plan that evicts."""
    shape = shape_of(build(family).config)
    if {shape.kind(layer) for layer in range(shape.layers)} & {"shared", "latent"}:
        # their drafts stay whole until `crop`, so a draft sees tokens that decoding has evicted
        return Outcome(math.nan, note="equal only where nothing is evicted", expected=True)

    def measured() -> float:
        drafted, plain = (served_subject(family, *KEEP_SETS["mixed"]) for _ in range(2))
        return difference(WAYS[way][0](drafted), WAYS[way][1](plain))

    return _or_refusal(family, way, measured)


def measure_v8(family: str) -> Outcome:
    """A prompt in chunks that is held until it ends against one that is fed at once."""

    def measured() -> float:
        results = []
        for settings in ({"prefill_chunk_size": 10}, {}):
            subject = served_subject(family, *KEEP_SETS["mixed"])
            cache = kvcompress.new_cache(subject.model, compress=HELD)
            inputs = prompts(3, LENGTH, PADS)
            results.append(ways.generate(subject, inputs, **as_argument(cache), **settings))
        return difference(*results)

    return _or_refusal(family, HELD, measured)
