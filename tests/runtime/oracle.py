"""The obvious way to compute what the compressed cache should: keep everything, mask with −inf.

A model runs with transformers' own DynamicCache and an attention function that holds, for every
(layer, row, KV head), a Python dictionary of the positions that would still be there. Slow,
float64, and written from the definition of the plan, not from the runtime.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcompress.evict.scorers import SCORERS
from kvcompress.plan import HeadPlan, Plan

NAME = "kvcompress_oracle"


class Oracle:
    """Keep-sets of one generation; register with `run`."""

    def __init__(self, plan: Plan, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.plan = plan
        self.ids = ids
        self.first = mask.argmax(1).tolist()
        self.kept: dict[tuple[int, int, int], dict[int, float]] = {}
        self.budget_length: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}
        self.dropped = 0

    def attention(
        self, module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs
    ):
        layer, length = module.layer_idx, query.shape[2]
        batch, heads = key.shape[:2]
        before = self.seen.get(layer, 0)
        keys, values = self._full(module, key, value, before)
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        self.seen[layer] = before + length
        if length > 1 or layer not in self.budget_length:
            self.budget_length[layer] = [before + length - f for f in self.first]
        groups = query.shape[1] // heads
        scorer = SCORERS[self.plan.scorer]
        for b in range(batch):
            for h in range(heads):
                mine = slice(h * groups, (h + 1) * groups)
                k, v = keys[b, h], values[b, h]
                sums = torch.zeros(before + length, dtype=torch.float64)
                for t in range(length):
                    now = before + t
                    if now < self.first[b]:
                        continue
                    visible = self._visible(layer, b, h, before, now)
                    logit = query[b, mine, t].double() @ k[visible].mT * scaling
                    if softcap is not None:
                        logit = torch.tanh(logit / softcap) * softcap
                    mass = logit.softmax(-1)
                    out[b, mine, t] = mass @ v[visible]
                    if self._votes(layer, now, before, length):
                        weight = float(scorer.row_weight(torch.tensor(now - self.first[b])))
                        sums[visible] += mass.mean(0) * weight
                self._take_in((layer, b, h), k.to(key.dtype), before, sums)
                self._evict(layer, b, h)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def _take_in(
        self, where: tuple[int, int, int], keys: torch.Tensor, before: int, sums: torch.Tensor
    ) -> None:
        scorer = SCORERS[self.plan.scorer]
        store = self.kept.setdefault(where, {})
        for position in range(max(before, self.first[where[1]]), len(keys)):
            head = torch.tensor(where[2])
            store[position] = float(scorer.initial(keys[position], torch.tensor(position), head))
        if scorer.uses_attention:
            for position in store:
                store[position] += float(sums[position])

    def _visible(self, layer: int, b: int, h: int, before: int, now: int) -> list[int]:
        """Positions that the query at `now` sees: what was kept, and the chunk up to itself."""
        window = self.plan.model.sliding_windows[layer]
        stored = list(self.kept.get((layer, b, h), {}))
        visible = stored + list(range(max(before, self.first[b]), now + 1))
        return visible if window is None else [p for p in visible if p > now - window]

    def _votes(self, layer: int, now: int, before: int, length: int) -> bool:
        rows = self.plan.score_rows
        if before == 0:
            self.first_vote = 0 if rows is None else max(0, length - rows)
        return now >= self.first_vote

    def _full(self, module, key, value, before):
        """DynamicCache gives sliding layers only their window: keep our own copy of everything."""
        store = self.__dict__.setdefault("all_kv", {})
        new = key.shape[2] if before == 0 else self.new_tokens
        k, v = key[:, :, -new:].double(), value[:, :, -new:].double()
        if module.layer_idx in store:
            k = torch.cat([store[module.layer_idx][0], k], 2)
            v = torch.cat([store[module.layer_idx][1], v], 2)
        store[module.layer_idx] = (k, v)
        return k, v

    def _evict(self, layer: int, b: int, h: int) -> None:
        plan, store = self.plan, self.kept[layer, b, h]
        head: HeadPlan = plan.heads[layer][h]
        window = plan.model.sliding_windows[layer]
        now = self.seen[layer] - 1
        sinks = 0 if window is not None else plan.sink_tokens
        exact = set(range(self.first[b], self.first[b] + sinks))
        rest = range(self.first[b] + sinks, now + 1)
        exact |= set(list(rest)[-plan.recent_tokens :])
        length = self.budget_length[layer][b]
        local = head.local.resolve(length) if head.local else 0
        frequent = head.frequent.resolve(length) if head.frequent else 0
        candidates = [p for p in store if p not in exact]
        if window is not None:
            candidates = [p for p in candidates if p > now + 1 - window]
        if head.full:
            keep = candidates
        else:
            classes = [p for p in candidates if self._in_class(head, b, p)]
            others = [p for p in candidates if p not in classes]
            others.sort(key=lambda p: self._rank(head, store, p, now, local), reverse=True)
            coded = range(self.first[b] + sinks, now + 1 - plan.recent_tokens)
            ever = sum(self._in_class(head, b, p) for p in coded)
            room = max(0, local - plan.recent_tokens) + frequent + ever
            if window is not None:
                room = min(room, window - plan.recent_tokens)
            classes.sort(reverse=True)
            keep = (classes + others if local + frequent else classes)[:room]
        self.dropped += len(candidates) - len(keep)
        self.kept[layer, b, h] = {p: s for p, s in store.items() if p in exact or p in set(keep)}

    def _in_class(self, head: HeadPlan, b: int, position: int) -> bool:
        token = int(self.ids[b, position])
        special = head.special and token in self.plan.special_ids
        return bool(special or (head.punct and token in self.plan.punct_ids))

    def _rank(self, head, store, position, now, local):
        inside = position > now - local
        if inside or head.frequent is None:
            return (inside, position)
        votes = torch.tensor(now + 1 - max(position, self.first_vote))
        return (False, float(SCORERS[self.plan.scorer].rank(torch.tensor(store[position]), votes)))


@torch.no_grad()
def run(
    model: PreTrainedModel, plan: Plan, inputs: dict[str, torch.Tensor], tokens: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Logits ``[B, steps, vocab]`` when `tokens` ``[B, steps]`` follow the prompt one by one, and
    how many (token, head) pairs were dropped on the way.
    """
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    oracle = Oracle(plan, ids, mask)
    AttentionInterface.register(NAME, oracle.attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        logits = feed(model, DynamicCache(config=model.config), inputs, tokens, oracle)
        return logits, oracle.dropped
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def feed(model, cache, inputs, tokens, oracle=None) -> torch.Tensor:
    """Prompt in one forward, then `tokens` one by one; logits after each forward but the last."""
    prompt = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for step in range(tokens.shape[1]):
        low, high = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        ids = inputs["input_ids"] if step == 0 else tokens[:, step - 1 : step]
        if oracle is not None:
            oracle.new_tokens = high - low
        out = model(
            input_ids=ids,
            attention_mask=mask[:, :high],
            position_ids=positions[:, low:high],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, -1].float())
    return torch.stack(logits, 1)
