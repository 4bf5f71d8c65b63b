"""The result of an evaluation as a value: what is printed, stored in a bundle and compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from kvcompress.measure.stats import Interval, paired
from kvcompress.measure.stats import interval as estimate
from kvcompress.plan import StrictModel
from kvcompress.tasks.documents import Sample

Key = TypeVar("Key", bound=Hashable)

QUINTILES: Final = 5
SPANS: Final = ((1, 1), (2, 4), (5, 8), (9, 16))


@dataclass(frozen=True, slots=True)
class Answered:
    """How one sample was answered.

    Attributes:
        exact: every answer of the sample, follow-ups included, was word for word right.
        keys_right: answers of the sample that were right.
        keys: answers that it asks for.
        output_tokens: tokens generated for it.
    """

    exact: bool
    keys_right: int
    keys: int
    output_tokens: int


class Recall(StrictModel):
    """Exact match on the recall samples, or on all samples where there is no recall task.

    Attributes:
        exact: share answered word for word.
        interval: 95 % bootstrap interval of `exact`, over samples.
        difference, difference_interval: `exact` minus the reference's, paired per sample; None
            for the reference itself.
        by_depth: per fifth of the document, first to last; None where no note lay there.
        by_span: per length of the answer in words.
        by_task: per task; a multi-key sample counts if all its keys were answered right.
        multi_key: share of the single keys of multi-key samples answered right.
        output_tokens: mean number of tokens generated per sample of all tasks, stop included.
    """

    samples: int
    exact: float
    interval: Interval
    difference: float | None = None
    difference_interval: Interval | None = None
    by_depth: tuple[float | None, ...]
    by_span: dict[str, float]
    by_task: dict[str, float]
    multi_key: float | None = None
    output_tokens: float


class TextQuality(StrictModel):
    """Teacher-forced continuation of held-out text behind a prefix that the cache holds.

    Attributes:
        tokens: predicted tokens.
        kl_nats: mean KL(reference || this) per token; 0 for the reference itself.
        flips: share of tokens whose likeliest prediction is another one than the reference's.
    """

    tokens: int
    perplexity: float
    kl_nats: float
    flips: float


class QualityReport(StrictModel):
    """Quality and bytes of one way to hold the cache.

    Attributes:
        name: row heading.
        target: what the plan was solved for; None for the reference, transformers' DynamicCache.
        kl_predicted: `text.kl_nats` as the plan's profile predicted it; None where it did not.
        visible: recall with the question in the prompt when it is prefilled.
        hidden: recall when the context is prefilled alone and the question fed afterwards.
        kv_bytes: measured after one prefill of `context_tokens` tokens, one row.
        kv_bytes_accounted: what the plan alone predicts for that; None for the reference.
        kv_bytes_bf16: the uncompressed 16-bit cache.
        weights_bytes: parameters and buffers of the model as loaded.
    """

    schema_version: Literal[1] = 1
    name: str
    target: str | None
    context_tokens: int
    seed: int
    visible: Recall | None
    hidden: Recall | None
    text: TextQuality | None
    kv_bytes: int
    kv_bytes_accounted: int | None
    kv_bytes_bf16: int
    weights_bytes: int
    kl_predicted: float | None = None

    @property
    def kv_ratio(self) -> float:
        """Measured bytes as a share of the 16-bit cache."""
        return self.kv_bytes / self.kv_bytes_bf16


def recall(
    samples: Sequence[Sample],
    answered: Sequence[Answered],
    reference: Sequence[Answered] | None = None,
    seed: int = 0,
) -> Recall:
    """Summarise; `answered` and `reference` are in the order of `samples`.

    Raises:
        ValueError: for no samples.
    """
    if not samples:
        raise ValueError("no samples to score: ask for at least one")
    scored = [i for i, sample in enumerate(samples) if sample.task == "recall"]
    scored = scored or list(range(len(samples)))
    hits = [float(answered[i].exact) for i in scored]
    exact, interval = estimate(hits, seed)
    difference: float | None = None
    difference_interval: Interval | None = None
    if reference is not None:
        theirs = [float(reference[i].exact) for i in scored]
        difference, difference_interval = paired(hits, theirs, seed)
    headline = [samples[i] for i in scored]
    depth = _share_by(headline, hits, lambda s: min(QUINTILES - 1, int(s.depth * QUINTILES)))
    span = _share_by(headline, hits, _span)
    task = _share_by(samples, [float(a.exact) for a in answered], lambda s: s.task)
    chains = [a for s, a in zip(samples, answered, strict=True) if s.follow_ups]
    return Recall(
        samples=len(scored),
        exact=exact,
        interval=interval,
        difference=difference,
        difference_interval=difference_interval,
        by_depth=tuple(depth.get(fifth) for fifth in range(QUINTILES)),
        by_span={name: span[name] for name in map(_span_name, SPANS) if name in span},
        by_task=task,
        multi_key=(
            sum(a.keys_right for a in chains) / sum(a.keys for a in chains) if chains else None
        ),
        output_tokens=sum(a.output_tokens for a in answered) / len(answered),
    )


def _span_name(span: tuple[int, int]) -> str:
    low, high = span
    return str(low) if low == high else f"{low}-{high}"


def _span(sample: Sample) -> str:
    for low, high in SPANS:
        if low <= sample.span_words <= high:
            return _span_name((low, high))
    return f">{SPANS[-1][1]}"


def _share_by(
    samples: Sequence[Sample], hits: Sequence[float], key: Callable[[Sample], Key]
) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for sample, hit in zip(samples, hits, strict=True):
        groups.setdefault(key(sample), []).append(hit)
    return {name: sum(group) / len(group) for name, group in groups.items()}
