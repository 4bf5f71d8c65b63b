"""Bytes of a compressed cache, computed from the plan alone.

They equal the bytes of the tensors that the runtime holds, which tests check.

One layer of the cache holds, for `batch` rows:
  exact     sinks and recent tokens of every KV head in the model's dtype, their positions (int32),
            class flags (uint8, if a head of the layer keeps classes), the row's start (int32)
  segments  per (row, head) `capacity_tokens` slots of codes, float16 scale and minimum, position
            (int32), and for heads that rank a score (float32), also one for each recent token
  index     20 bytes per (row, head): where its segment lies, and its local window
Capacities grow in blocks, so bytes move in steps while tokens are generated.

A layer with a recall tier holds, for the same rows, the exact tokens, a window of whole blocks of
codes and the digests of the blocks on the host; the host's blocks are counted apart. A batch is a
rectangle there: its longest row sets the size of all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, KVDtype, ModelShape, Plan, Recall
from kvcompress.storage import STORAGES

GROW_TOKENS: Final = 32
POSITION_BYTES: Final = 4
SCORE_BYTES: Final = 4
FLAG_BYTES: Final = 1
INDEX_BYTES: Final = 20
GROW_BLOCKS: Final = 8


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def keeps_scores(head: HeadPlan) -> bool:
    """Whether the head drops the token with the lowest score; other heads drop their oldest token,
    or nothing."""
    mixed = head.local is not None or head.cap is not None
    return head.frequent is not None or (keeps_classes(head) and mixed)


def keeps_classes(head: HeadPlan) -> bool:
    return head.special or head.punct


def budget_tokens(head: HeadPlan, length_tokens: int, recent_tokens: int) -> int:
    """Coded slots that `frequent` and `local` grant a row, beyond its sinks and recent tokens."""
    local = head.local.resolve(length_tokens) if head.local else 0
    frequent = head.frequent.resolve(length_tokens) if head.frequent else 0
    return max(0, local - recent_tokens) + frequent


def sinks_of(plan: Plan, layer: int) -> int:
    """Sink slots of a layer; none where the architecture's window lets the first tokens go."""
    return 0 if plan.model.sliding_windows[layer] is not None else plan.sink_tokens


def protected_tokens(spans: Sequence[range], first: int, stop: int) -> int:
    """How many tokens numbered ``first ≤ i < stop`` lie in one of the (disjoint) `spans`."""
    return sum(max(0, min(span.stop, stop) - max(span.start, first)) for span in spans)


def capacity_tokens(
    plan: Plan,
    layer: int,
    head: HeadPlan,
    seen_tokens: int,
    budget_length: int,
    class_tokens: int,
    spans: Sequence[range] = (),
) -> int:
    """Slots of codes that one (row, head) holds.

    Args:
        seen_tokens: real tokens of the row so far.
        budget_length: real tokens when the last prompt ended; ratios resolve against it.
        class_tokens: special and punctuation tokens that the head keeps in codes.
        spans: protected tokens of the row, numbered from its first real token.
    """
    window = plan.model.sliding_windows[layer]
    exact = sinks_of(plan, layer) + plan.recent_tokens
    coded = round_up(max(0, seen_tokens - exact), GROW_TOKENS)
    if not head.full:
        budget = budget_tokens(head, budget_length, plan.recent_tokens)
        budget += class_tokens
        if head.cap is not None:
            budget = min(budget, head.cap)
        left = seen_tokens - plan.recent_tokens
        budget += protected_tokens(spans, sinks_of(plan, layer), left)
        coded = min(coded, budget)
    if window is not None:
        coded = min(coded, max(0, window - plan.recent_tokens))
    return coded


def vector_bytes(dtype: KVDtype, head_dim: int, model_dtype_bytes: int, groups: int = 1) -> int:
    """One stored vector with its scale and minimum."""
    return STORAGES[dtype].vector_bytes(head_dim, model_dtype_bytes, groups)


def slot_bytes(head: HeadPlan, shape: ModelShape) -> int:
    """One coded token of one head: K, V, position and, where the head ranks, its score."""
    dim, size = shape.head_dim, shape.model_dtype_bytes
    k = vector_bytes(head.k_dtype, dim, size)
    v = vector_bytes(
        head.v_dtype, shape.v_dim, size, STORAGES[head.v_dtype].value_groups(shape.v_dim)
    )
    score = SCORE_BYTES if keeps_scores(head) else 0
    return k + v + POSITION_BYTES + score


def row_head_bytes(
    plan: Plan,
    layer: int,
    head: HeadPlan,
    seen_tokens: int,
    budget_length: int,
    class_tokens: int,
    spans: Sequence[range] = (),
    chosen: HeadPlan | None = None,
) -> int:
    """Bytes of one (row, head); arguments as for `capacity_tokens`.

    Args:
        head: as the plan has it, which decides how a slot is stored.
        chosen: the head that the plan's rule chose for the row; None is `head` itself.
    """
    exact = sinks_of(plan, layer) + plan.recent_tokens
    capacity = capacity_tokens(
        plan, layer, chosen or head, seen_tokens, budget_length, class_tokens, spans
    )
    vector = (plan.model.head_dim + plan.model.v_dim) * plan.model.model_dtype_bytes
    scores = SCORE_BYTES * plan.recent_tokens if keeps_scores(head) else 0
    return capacity * slot_bytes(head, plan.model) + exact * vector + scores + INDEX_BYTES


def head_plan_bytes(plan: Plan, layer: int, head: HeadPlan, context_tokens: int, batch: int) -> int:
    """Bytes of one KV head that follows `head`, all rows `context_tokens` long.

    Class tokens are expected from the plan's `special_share` and `punct_share`; everything else is
    exact.
    """
    if plan.recalls(layer):
        return recall_head_bytes(plan, layer, head, [context_tokens] * batch)
    share = plan.special_share * head.special + plan.punct_share * head.punct
    exact = sinks_of(plan, layer) + plan.recent_tokens
    classes = round(share * max(0, context_tokens - exact))
    return batch * row_head_bytes(plan, layer, head, context_tokens, context_tokens, classes)


def head_bytes(plan: Plan, layer: int, head: int, context_tokens: int, batch: int) -> int:
    """`head_plan_bytes` of the head that the plan has there."""
    return head_plan_bytes(plan, layer, plan.heads[layer][head], context_tokens, batch)


def layer_shared_bytes(plan: Plan, layer: int, batch: int) -> int:
    """Bytes that the heads of a layer share: positions and flags of the exact slots, row starts."""
    if not plan.heads[layer] or plan.recalls(layer):
        return 0
    exact = sinks_of(plan, layer) + plan.recent_tokens
    flags = FLAG_BYTES if any(map(keeps_classes, plan.heads[layer])) else 0
    return batch * (exact * (POSITION_BYTES + flags) + POSITION_BYTES)


def layer_bytes(plan: Plan, layer: int, context_tokens: int, batch: int) -> int:
    heads = range(len(plan.heads[layer]))
    own = sum(head_bytes(plan, layer, head, context_tokens, batch) for head in heads)
    return own + layer_shared_bytes(plan, layer, batch)


def kv_bytes(plan: Plan, context_tokens: int, batch: int) -> int:
    """Bytes of the whole cache after `context_tokens` tokens in each of `batch` rows."""
    layers = range(plan.model.layers)
    return sum(layer_bytes(plan, layer, context_tokens, batch) for layer in layers)


def prefill_bytes(shape: ModelShape, context_tokens: int, batch: int) -> int:
    """Uncompressed keys and values of one layer: a prompt is compressed layer by layer."""
    vector = (shape.head_dim + shape.v_dim) * shape.model_dtype_bytes
    return batch * shape.kv_heads * context_tokens * vector


def cache_bytes(
    plan: Plan,
    seen_tokens: list[int],
    prompt_tokens: list[int],
    spans: Sequence[Sequence[range]] | None = None,
    chosen: Sequence[Sequence[Sequence[HeadPlan]]] | None = None,
) -> int:
    """Bytes of a cache whose rows have these real lengths now and had those when the prompt ended.

    Exact for plans without class tokens, whose number only the text tells.

    Args:
        spans: protected tokens of each row.
        chosen: ``[layer][row]`` heads as a rule for each request chose them, see
            `CompressedCache.chosen_heads`; None: the plan's.
    """
    total = sum(
        recall_head_bytes(plan, layer, head, seen_tokens, prompt_tokens)
        for layer, heads in enumerate(plan.heads)
        if plan.recalls(layer)
        for head in heads
    )
    protected = spans or [()] * len(seen_tokens)
    for row, (seen, prompt) in enumerate(zip(seen_tokens, prompt_tokens, strict=True)):
        for layer, heads in enumerate(plan.heads):
            if plan.recalls(layer):
                continue
            total += layer_shared_bytes(plan, layer, 1)
            own = heads if chosen is None else chosen[layer][row]
            total += sum(
                row_head_bytes(plan, layer, head, seen, prompt, 0, protected[row], now)
                for head, now in zip(heads, own, strict=True)
            )
    return total


# ---- the recall tier
@dataclass(frozen=True, slots=True)
class RecallBlocks:
    """Blocks of each row in a layer with a recall tier.

    Attributes:
        window: blocks that the device may hold.
        used: blocks on the device, of which the newest may be filled in part.
        host: blocks on the host.
    """

    window: list[int]
    used: list[int]
    host: list[int]

    @property
    def allocated(self) -> int:
        """Blocks on the device for which each row has room."""
        return max(self.used)

    @property
    def digests(self) -> int:
        """Blocks for whose digests each row has room."""
        return round_up(max(self.host), GROW_BLOCKS)


def recall_blocks(
    recall: Recall, exact_tokens: int, seen_tokens: Sequence[int], prompt_tokens: Sequence[int]
) -> RecallBlocks:
    """Blocks of rows that have these real lengths now and had those when the prompt ended."""
    found = RecallBlocks([], [], [])
    for seen, prompt in zip(seen_tokens, prompt_tokens, strict=True):
        coded = max(0, seen - exact_tokens)
        window = recall.window_blocks(prompt, exact_tokens)
        host = recall.host_blocks(coded, window)
        found.window.append(window)
        found.host.append(host)
        found.used.append(-(-coded // recall.block_tokens) - host)
    return found


def recall_block_bytes(plan: Plan, head: HeadPlan) -> int:
    """One block of codes of one KV head; its position follows from its number."""
    assert plan.recall is not None
    return plan.recall.block_tokens * (slot_bytes(head, plan.model) - POSITION_BYTES)


def recall_head_bytes(
    plan: Plan,
    layer: int,
    head: HeadPlan,
    seen_tokens: Sequence[int],
    prompt_tokens: Sequence[int] | None = None,
) -> int:
    """Bytes on the device of one KV head of all rows."""
    shape, recall = plan.model, plan.recall
    assert recall is not None
    exact = sinks_of(plan, layer) + plan.recent_tokens
    blocks = recall_blocks(recall, exact, seen_tokens, prompt_tokens or seen_tokens)
    vectors = 2 if recall.digest == "minmax" else 1
    row = exact * (shape.head_dim + shape.v_dim) * shape.model_dtype_bytes
    row += blocks.allocated * recall_block_bytes(plan, head)
    row += blocks.digests * vectors * vector_bytes("int8", shape.head_dim, shape.model_dtype_bytes)
    return len(seen_tokens) * row


def host_slots(blocks: int) -> int:
    """Blocks for which the host has room while it holds `blocks`: at most an eighth more, or 7."""
    return round_up(blocks, max(GROW_BLOCKS, 2 ** max(0, blocks.bit_length() - 4)))


def host_bytes(
    plan: Plan, seen_tokens: Sequence[int], prompt_tokens: Sequence[int] | None = None
) -> int:
    """Bytes of host memory of the recall tier; rows that were copied share theirs."""
    total = 0
    for layer, heads in enumerate(plan.heads):
        if plan.recall is None or not plan.recalls(layer):
            continue
        exact = sinks_of(plan, layer) + plan.recent_tokens
        blocks = recall_blocks(plan.recall, exact, seen_tokens, prompt_tokens or seen_tokens)
        total += host_slots(sum(blocks.host)) * sum(recall_block_bytes(plan, h) for h in heads)
    return total


def recalled_bytes(plan: Plan, context_tokens: int, batch: int) -> int:
    """Bytes that a decode step brings back in the layer where they are most; freed after it."""
    most = 0
    for layer, heads in enumerate(plan.heads):
        if plan.recall is None or not plan.recalls(layer):
            continue
        exact = sinks_of(plan, layer) + plan.recent_tokens
        host = recall_blocks(plan.recall, exact, [context_tokens], [context_tokens]).host[0]
        brought = min(host, plan.recall.recall_blocks)
        most = max(most, batch * brought * sum(recall_block_bytes(plan, h) for h in heads))
    return most


def recall_within(plan: Plan, memory_bytes: int, context_tokens: int, batch: int) -> Plan:
    """The plan with the largest resident part that leaves a decode step within `memory_bytes`.

    Counted are the resident part at `context_tokens` and the blocks that one layer brings back.

    Raises:
        PlanError: for a plan without a recall tier, or naming the bytes that the smallest lacks.
    """
    recall = plan.recall
    if recall is None:
        raise PlanError("the plan has no recall tier; set its recall first")
    exact = plan.sink_tokens + plan.recent_tokens

    def with_window(blocks: int) -> Plan:
        resident = Budget(tokens=exact + blocks * recall.block_tokens)
        return plan.model_copy(update={"recall": recall.model_copy(update={"resident": resident})})

    def held(blocks: int) -> int:
        tried = with_window(blocks)
        return kv_bytes(tried, context_tokens, batch) + recalled_bytes(tried, context_tokens, batch)

    # Digests are allocated GROW_BLOCKS at a time, so bytes rise from one such step to the next.
    most = max(1, -(-(context_tokens - exact) // recall.block_tokens))
    steps = range(1, most + 1, GROW_BLOCKS)
    first = steps[max(0, bisect_right(steps, memory_bytes, key=held) - 1)]
    fitting = [w for w in range(first, first + 2 * GROW_BLOCKS) if held(w) <= memory_bytes]
    if fitting:
        return with_window(min(most, fitting[-1]))
    least = min(map(held, range(1, 1 + GROW_BLOCKS)))
    raise PlanError(
        f"{memory_bytes} bytes are {least - memory_bytes} too few for a recall tier at "
        f"{context_tokens} tokens, batch {batch}: the smallest needs {least}; give more, recall "
        "fewer blocks, or use smaller blocks or the mean digest"
    )
