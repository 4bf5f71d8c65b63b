"""Rules that a plan follows while a model runs.

Some decide for each request when its prompt ends; `Recall` moves tokens to host memory.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcompress.head_plan import Budget, PositiveInt, StrictModel

DigestName = Literal["minmax", "mean"]


class PooledBudget(StrictModel):
    """Heads share their `frequent` budgets: the best tokens of all of them are kept.

    Source: AdaKV (arXiv 2407.11550), algorithm 1, over a layer; KVzip (arXiv 2505.23416), section
    3.3, over the model, for which the whole prompt is held until it ends.

    Attributes:
        floor: share of its own budget that every head keeps in any case.
    """

    kind: Literal["pooled"]
    scope: Literal["layer", "model"] = "layer"
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2


class Threshold(StrictModel):
    """A head keeps the tokens whose rank is at least `at_least`; its `frequent` budget is the cap.

    Source: CORM (arXiv 2404.15949); KVzap (2026).
    """

    kind: Literal["threshold"]
    at_least: float


class FastGenChoice(StrictModel):
    """At the end of each prompt every head takes the cheapest keep-set that recovers enough.

    Source: FastGen (arXiv 2310.01801), algorithm 1; see `FastGenPolicy` for the fields.
    """

    kind: Literal["fastgen"]
    recovery: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    reading: Literal["mass", "l1"] = "mass"


PerRequest = Annotated[PooledBudget | Threshold | FastGenChoice, Field(discriminator="kind")]


class Recall(StrictModel):
    """Old tokens move to host memory in blocks; the best blocks come back for each step.

    A row keeps its sinks, its recent tokens and a window of coded tokens on the device. Older
    coded tokens lie on the host. For each of their blocks and KV heads a digest, a vector or two
    that stand for the block's keys, stays on the device and ranks the block.

    Attributes:
        resident: tokens of a row on the device, sinks and recent ones included; rounded down to
            whole blocks of coded tokens, of which at least one stays.
        recall_blocks: blocks that each query row brings back for each KV head.
        block_tokens: tokens of a block, a multiple of 16.
        digest: what ranks the blocks: ``minmax`` holds the smallest and the largest key of each
            channel, ``mean`` the mean key; see `kvcompress.evict.digest`.
    """

    resident: Budget
    recall_blocks: PositiveInt = 16
    block_tokens: Annotated[int, Field(ge=16, le=128, multiple_of=16)] = 16
    digest: DigestName = "minmax"

    def window_blocks(self, length_tokens: int, exact_tokens: int) -> int:
        """Blocks of coded tokens that stay on the device.

        Args:
            length_tokens: real tokens of the row when its last prompt ended.
            exact_tokens: sinks and recent tokens.
        """
        return max(1, (self.resident.resolve(length_tokens) - exact_tokens) // self.block_tokens)

    def host_blocks(self, coded_tokens: int, window_blocks: int) -> int:
        """Blocks that lie on the host: as few as leave the others room in the window."""
        return max(0, -(-coded_tokens // self.block_tokens) - window_blocks)
