"""The obvious way to compute what a recall tier should: keep everything, mask with −inf.

As `oracle`, for plans with `recall`: per (layer, row, KV head) and query row it asks where each
earlier token lies, ranks the blocks that lie on the host by a naive loop, and hides the others.
Slow, float64, exact keys, and written from the definition, not from the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcompress.plan import Plan
from kvcompress.quant.codec import roundtrip
from tests.runtime.oracle import feed

NAME = "kvcompress_recall_oracle"


class RecallOracle:
    """Register with `run`.

    Attributes:
        hidden: (token, query row, head) triples that a row could have seen and did not.
        chosen: by (layer, row, KV head, query number): the blocks that it recalled.
    """

    def __init__(self, plan: Plan, mask: Tensor) -> None:
        assert plan.recall is not None
        self.plan, self.recall = plan, plan.recall
        self.first = mask.argmax(1).tolist()
        self.all_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompt: dict[int, int] = {}
        self.hidden = 0
        self.chosen: dict[tuple[int, int, int, int], set[int]] = {}

    def attention(
        self, module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs
    ):
        layer, length = module.layer_idx, query.shape[2]
        k, v = key[:, :, -length:].double(), value[:, :, -length:].double()
        if layer in self.all_kv:
            k = torch.cat([self.all_kv[layer][0], k], 2)
            v = torch.cat([self.all_kv[layer][1], v], 2)
        self.all_kv[layer] = (k, v)
        before = k.shape[2] - length
        out = torch.zeros(*query.shape[:3], v.shape[-1], dtype=torch.float64)
        heads = k.shape[1]
        for b in range(query.shape[0]):
            for h in range(heads):
                mine = range(h * query.shape[1] // heads, (h + 1) * query.shape[1] // heads)
                for t in range(length):
                    now = before + t
                    if now < self.first[b]:
                        continue
                    q = query[b, mine, t].double() * scaling
                    seen = self._visible(layer, b, h, before, now, q)
                    logit = q @ k[b, h, seen].T
                    if softcap is not None:
                        logit = torch.tanh(logit / softcap) * softcap
                    if s_aux is not None:
                        logit = torch.cat([logit, s_aux[mine, None].double()], 1)
                    mass = logit.softmax(-1)[:, : len(seen)]
                    out[b, mine, t] = mass @ v[b, h, seen]
        if length > 1 or not before:
            self.prompt[layer] = before + length
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def _visible(self, layer: int, b: int, h: int, before: int, now: int, q: Tensor) -> list[int]:
        """What the queries ``[G, D]`` at `now` see, in a forward that starts at `before`."""
        first, window = self.first[b], self.plan.model.sliding_windows[layer]
        everything = list(range(first, now + 1))
        if window is not None:
            return [p for p in everything if p > now - window]
        sinks, size = self.plan.sink_tokens, self.recall.block_tokens
        stored = [p for p in everything if p < before]
        chunk = [p for p in everything if p >= before]
        coded = stored[sinks : -self.plan.recent_tokens]
        exact = [p for p in stored if p not in coded]
        blocks = [coded[i : i + size] for i in range(0, len(coded), size)]
        budget = self.recall.resident.resolve(self.prompt.get(layer, first) - first)
        room = max(1, (budget - sinks - self.plan.recent_tokens) // size)
        away, window_blocks = blocks[: max(0, len(blocks) - room)], blocks[-room:]
        keys = self.all_kv[layer][0][b, h]
        scores = self._scores(q, [keys[block] for block in away])
        best = sorted(range(len(away)), key=scores.__getitem__, reverse=True)[
            : self.recall.recall_blocks
        ]
        self.chosen[layer, b, h, now] = set(best)
        seen = exact + sum(window_blocks, []) + chunk + sum((away[j] for j in best), [])
        self.hidden += len(everything) - len(seen)
        return sorted(seen)

    def _scores(self, queries: Tensor, blocks: list[Tensor]) -> list[float]:
        """What each block promises the queries of the group, all together."""
        return [sum(self._promise(q, keys) for q in queries.tolist()) for keys in blocks]

    def _promise(self, q: list[float], keys: Tensor) -> float:
        if self.recall.digest == "mean":
            return sum(x * y for x, y in zip(q, _as_stored(keys.mean(0)), strict=True))
        low, high = _as_stored(keys.amin(0)), _as_stored(keys.amax(0))
        return sum(x * (z if x > 0 else a) for x, a, z in zip(q, low, high, strict=True))


def _as_stored(vector: Tensor) -> list[float]:
    return roundtrip(vector, "int8").tolist()


@torch.no_grad()
def run(
    model: PreTrainedModel,
    plan: Plan,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    schedule: Sequence[int] | None = None,
) -> tuple[Tensor, RecallOracle]:
    """Logits ``[B, forwards, vocab]`` as `feed` gives them, and the oracle that gave them."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    oracle = RecallOracle(plan, mask)
    AttentionInterface.register(NAME, oracle.attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        cache = DynamicCache(config=model.config)
        return feed(model, cache, inputs, tokens, schedule), oracle
    finally:
        model.set_attn_implementation(before)
