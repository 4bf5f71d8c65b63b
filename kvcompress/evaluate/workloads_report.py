"""The outcome of one workload as a value."""

from __future__ import annotations

import math
from typing import Literal

from kvcompress.plan import StrictModel


class WorkloadOutcome(StrictModel):
    """How one way to hold the cache did on one workload. Tuples are in the order of the suite.

    Attributes:
        target: what the plan was solved for; None for the reference, transformers' DynamicCache.
        hits: per sample the share of its questions answered word for word: generated, or, where
            the true answers are fed, with every token the likeliest. Where there is text alone, per
            window the share of tokens whose likeliest prediction is the reference's.
        output_tokens: per sample the tokens generated for all its questions, stop included; or
            the tokens that were scored.
        answer_nats: per sample the mean −log p of a token of the true answers, None where the
            model answers; per window where there is text alone.
        kl_nats: per text window the mean KL(reference || this) per token, 0 for the reference;
            None where the workload has no windows, as the next two. In `beyond` the reference is
            itself lost, so a large value is no fault there: read the perplexity.
        perplexity: per text window.
        flips: per text window the share of tokens whose likeliest prediction is another one than
            the reference's.
        kv_bytes: measured over the cache's tensors when the first question comes, so after what
            was generated in `long_generation` and after the prompt elsewhere; mean over rows. The
            reference also holds the few pads of shorter rows. A model that runs in a wider dtype
            than its files have is counted in that of its files.
        host_bytes: of host memory that a recall tier holds beside them, mean over rows.
        kv_bytes_bf16: an uncompressed 16-bit cache of the same rows.
    """

    schema_version: Literal[1] = 1
    workload: str
    target: str | None
    context_tokens: int
    seed: int
    hits: tuple[float, ...]
    output_tokens: tuple[int, ...]
    answer_nats: tuple[float, ...] | None = None
    kl_nats: tuple[float, ...] | None = None
    perplexity: tuple[float, ...] | None = None
    flips: tuple[float, ...] | None = None
    kv_bytes: int
    kv_bytes_bf16: int
    host_bytes: int = 0

    @property
    def score(self) -> float:
        """Mean of `hits`."""
        return sum(self.hits) / len(self.hits)

    @property
    def kv_ratio(self) -> float:
        """Measured bytes as a share of the 16-bit cache."""
        return self.kv_bytes / self.kv_bytes_bf16

    @property
    def mean_perplexity(self) -> float | None:
        """Of all windows together, which are equally long: the geometric mean."""
        if self.perplexity is None:
            return None
        return math.exp(sum(map(math.log, self.perplexity)) / len(self.perplexity))
