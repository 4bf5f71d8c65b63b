"""The obvious way to compute what the compressed cache should: keep everything, mask with −inf.

A model runs with transformers' own DynamicCache and an attention function that holds, for every
(layer, row, KV head), a Python dictionary of the positions that would still be there. Slow,
float64, and written from the definition of the plan, not from the runtime.

What `DynamicCache` hands to an attention function: the keys of the forward's tokens come last. A
latent layer hands over keys expanded to one per query head; a layer that shares keys is handed
those of its source.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcompress.evict.scorers import scorer as scorer_named
from kvcompress.plan import HeadPlan, Plan
from kvcompress.runtime.names import as_argument

NAME = "kvcompress_oracle"
Spans = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]


class Oracle:
    """Keep-sets of one generation; register with `run`.

    Args:
        ids, mask: ``[B, S]`` of every token that will be fed, and 0 for left padding.
        protect: as `CompressedCache` takes it.

    Attributes:
        kept: by (layer, row, KV head): position → score of every token that is still there.
        dropped: (token, head) pairs that went, those that the architecture hides anyway aside.
    """

    def __init__(self, plan: Plan, ids: Tensor, mask: Tensor, protect: Spans = ()) -> None:
        if plan.positions != "original":
            raise NotImplementedError("the oracle computes original positions")
        self.plan = plan
        self.ids = ids.tolist()
        self.first = mask.argmax(1).tolist()
        self.protect = per_row(protect, len(ids))
        self.kept: dict[tuple[int, int, int], dict[int, float]] = {}
        self.sums: dict[tuple[int, int, int], Tensor] = {}
        self.all_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.budget_length: dict[int, list[int]] = {}
        self.forwards: dict[int, list[int]] = {}
        self.first_vote = 0
        self.dropped = 0

    # ---- attention
    def attention(
        self,
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        softcap=None,
        s_aux=None,
        **kwargs,
    ):
        reader, length = module.layer_idx, query.shape[2]
        sources = self.plan.model.kv_sources
        layer = sources[reader] if sources else reader
        if reader == layer:
            self._take_keys(layer, key, value, length)
        keys, values = self.all_kv[layer]
        before = keys.shape[2] - length
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        heads = self.plan.model.heads_of(layer)
        for b in range(query.shape[0]):
            for h in range(heads):
                mine = range(h * query.shape[1] // heads, (h + 1) * query.shape[1] // heads)
                own = [q * keys.shape[1] // query.shape[1] for q in mine]  # the key head of each
                k, v = keys[b, own], values[b, own]
                sums = self.sums.setdefault((layer, b, h), torch.zeros(0, dtype=torch.float64))
                sums = torch.cat([sums, sums.new_zeros(keys.shape[2] - len(sums))])
                for t in range(length):
                    now = before + t
                    if now < self.first[b]:
                        continue
                    seen = self._visible(layer, b, h, before, now)
                    logit = torch.einsum("gd,gsd->gs", query[b, mine, t].double(), k[:, seen])
                    logit = logit * scaling
                    if softcap is not None:
                        logit = torch.tanh(logit / softcap) * softcap
                    if s_aux is not None:
                        logit = torch.cat([logit, s_aux[mine, None].double()], 1)
                    mass = logit.softmax(-1)[:, : len(seen)]
                    out[b, mine, t] = torch.einsum("gs,gsd->gd", mass, v[:, seen])
                    counted = mass.mean(0) * self._weight(b, now)
                    sums[seen] += counted * self._counts(b, seen, now, length, first=before == 0)
                self.sums[layer, b, h] = sums
        if reader == self.plan.model.readers(layer)[-1]:
            self._settle(layer, query.shape[0])
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def _take_keys(self, layer: int, key: Tensor, value: Tensor, length: int) -> None:
        """DynamicCache gives sliding layers only their window: keep our own copy of everything."""
        k, v = key[:, :, -length:].double(), value[:, :, -length:].double()
        if layer in self.all_kv:
            k = torch.cat([self.all_kv[layer][0], k], 2)
            v = torch.cat([self.all_kv[layer][1], v], 2)
        elif self.plan.score_rows is not None and self.plan.score_stride is None:
            self.first_vote = max(0, length - self.plan.score_rows)
        self.all_kv[layer] = (k, v)
        self.forwards.setdefault(layer, []).append(length)

    def _visible(self, layer: int, b: int, h: int, before: int, now: int) -> list[int]:
        """Positions that the query at `now` sees: what was kept, and the chunk up to itself."""
        stored = list(self.kept.get((layer, b, h), {}))
        visible = stored + list(range(max(before, self.first[b]), now + 1))
        return [p for p in visible if self._in_reach(layer, b, p, now)]

    def _in_reach(self, layer: int, b: int, position: int, now: int) -> bool:
        """Whether the architecture lets a query at `now` see a key at `position` before it."""
        size = self.plan.model.sliding_windows[layer]
        if size is None:
            return True
        if self.plan.model.kind(layer) == "chunked":
            return (position - self.first[b]) // size == (now - self.first[b]) // size
        return position > now - size

    def _weight(self, b: int, now: int) -> float:
        """How much the query at `now` counts in the scores."""
        scorer = scorer_named(self.plan.scorer)
        if not scorer.uses_attention or now < self.first_vote:
            return 0.0
        return float(scorer.row_weight(torch.tensor(now - self.first[b])))

    def _counts(self, b: int, seen: list[int], now: int, length: int, first: bool) -> Tensor:
        """How often the query at `now` counts for each key of `seen`."""
        near, stride = self.plan.score_rows, self.plan.score_stride
        number = now - self.first[b]
        far = 1
        if first and near is not None and stride is not None and now < length - near:
            block = number // stride
            own = block * 40503 % 65536 * stride // 65536 == number % stride
            far = stride if own else 0
        newest = near if stride is not None and near is not None else 0
        return torch.tensor([1 if now - p < newest else far for p in seen], dtype=torch.float64)

    # ---- the keep rule
    def _settle(self, layer: int, batch: int) -> None:
        """After a forward's last reader: take its tokens in, then evict."""
        keys, _ = self.all_kv[layer]
        length = self.forwards[layer][-1]
        if length > 1 or layer not in self.budget_length:
            self.budget_length[layer] = [keys.shape[2] - f for f in self.first]
        for b in range(batch):
            for h in range(self.plan.model.heads_of(layer)):
                self._take_in(layer, b, h, keys.shape[2] - length)
                self._evict(layer, b, h)
        for where in self.sums:
            if where[0] == layer:
                self.sums[where].zero_()

    def _take_in(self, layer: int, b: int, h: int, before: int) -> None:
        scorer = scorer_named(self.plan.scorer)
        keys, _ = self.all_kv[layer]
        store = self.kept.setdefault((layer, b, h), {})
        for position in range(max(before, self.first[b]), keys.shape[2]):
            if self.plan.scorer == "key_norm" and self.plan.model.kind(layer) == "latent":
                raise NotImplementedError("the norm of a latent: expanded keys do not tell it")
            key = keys[b, h, position].float()
            start = scorer.initial(key, torch.tensor(position), torch.tensor(h))
            store[position] = float(start)
        for position in store:
            store[position] += float(self.sums[layer, b, h][position])

    def _evict(self, layer: int, b: int, h: int) -> None:
        plan, store = self.plan, self.kept[layer, b, h]
        head = plan.heads[layer][h]
        now = self.all_kv[layer][0].shape[2] - 1
        rest = list(range(self.first[b], now + 1))
        sinks = 0 if plan.model.sliding_windows[layer] is not None else plan.sink_tokens
        exact, coded = set(rest[:sinks]), rest[sinks:]
        exact |= set(coded[-plan.recent_tokens :])
        coded = coded[: -plan.recent_tokens]
        candidates = [p for p in store if p in coded and self._in_reach(layer, b, p, now + 1)]
        if head.full:
            keep = set(candidates)
        else:
            keep = self._choose(layer, b, h, candidates, coded, now)
        self.dropped += len(candidates) - len(keep)
        self.kept[layer, b, h] = {p: s for p, s in store.items() if p in exact or p in keep}

    def _choose(
        self, layer: int, b: int, h: int, candidates: list[int], coded: list[int], now: int
    ) -> set[int]:
        """The coded tokens that stay.

        Args:
            candidates: tokens that are stored or arrive, beyond sinks and recent tokens.
            coded: every token that ever was one of those.
        """
        room = self._room(layer, b, h, coded)
        ranks = self._ranks(layer, b, h, candidates, now)
        best = sorted(ranks, key=lambda p: ranks[p], reverse=True)
        if self.plan.turn_tokens:
            best = self._turns_first(layer, b, best, room)
        return set(best[:room])

    def _room(self, layer: int, b: int, h: int, coded: list[int]) -> int:
        plan, head = self.plan, self.plan.heads[layer][h]
        length = self.budget_length[layer][b]
        room = head.frequent.resolve(length) if head.frequent else 0
        if head.local:
            room += max(0, head.local.resolve(length) - plan.recent_tokens)
        room += sum(self._special(head, b, p) or self._punct(head, b, p) for p in coded)
        if head.cap is not None:
            room = min(room, head.cap)
        room = min(len(coded), room + sum(self._protected(b, p) for p in coded))
        window = plan.model.sliding_windows[layer]
        return room if window is None else min(room, window - plan.recent_tokens)

    def _ranks(
        self, layer: int, b: int, h: int, candidates: list[int], now: int
    ) -> dict[int, tuple[int, float]]:
        """Class of each token, and its order within; a token that the head never keeps has none."""
        head = self.plan.heads[layer][h]
        local = head.local.resolve(self.budget_length[layer][b]) if head.local else 0
        scores = self._scores(layer, b, h, candidates, now)
        ranks: dict[int, tuple[int, float]] = {}
        for p in candidates:
            if self._protected(b, p):
                ranks[p] = (4, p)
            elif self._special(head, b, p):
                ranks[p] = (3, p)
            elif p > now - local:
                ranks[p] = (2, p)
            elif self._punct(head, b, p):
                ranks[p] = (1, p)
            elif head.frequent is not None:
                ranks[p] = (0, scores[p])
            elif head.local is not None:
                ranks[p] = (0, p)
        return ranks

    def _turns_first(self, layer: int, b: int, best: list[int], room: int) -> list[int]:
        """`best` again: protected tokens, then the quota of every turn, then the rest."""
        turn_of = turns(self.forwards[layer])
        quota = min(self.plan.turn_tokens, room // (turn_of[-1] + 1))
        held = [0] * (turn_of[-1] + 1)
        tiers: dict[int, int] = {}
        for p in best:
            if self._protected(b, p):
                tiers[p] = 0
                continue
            held[turn_of[p]] += 1
            tiers[p] = 1 if held[turn_of[p]] <= quota else 2
        return sorted(best, key=lambda p: tiers[p])

    def _protected(self, b: int, position: int) -> bool:
        number = position - self.first[b]
        return any(low <= number < high for low, high in self.protect[b])

    def _special(self, head: HeadPlan, b: int, position: int) -> bool:
        return head.special and self.ids[b][position] in self.plan.special_ids

    def _punct(self, head: HeadPlan, b: int, position: int) -> bool:
        return head.punct and self.ids[b][position] in self.plan.punct_ids

    def _scores(
        self, layer: int, b: int, h: int, positions: list[int], now: int
    ) -> dict[int, float]:
        store = self.kept[layer, b, h]
        votes = torch.tensor([now + 1 - max(p, self.first_vote) for p in positions])
        score = torch.tensor([store[p] for p in positions], dtype=torch.float64)
        rank = scorer_named(self.plan.scorer).rank(score, votes, now)
        return dict(zip(positions, rank.tolist(), strict=True))


def turns(forwards: Sequence[int]) -> list[int]:
    """The turn of each token. A forward of several tokens after one of one token starts a turn."""
    turn, result = 0, []
    for index, length in enumerate(forwards):
        turn += index > 0 and length > 1 and forwards[index - 1] == 1
        result += [int(turn)] * length
    return result


def per_row(protect: Spans, rows: int) -> list[list[tuple[int, int]]]:
    """The same spans for every row, or each row's own."""
    nested = len(protect) > 0 and not (len(protect[0]) == 2 and isinstance(protect[0][0], int))
    return [list(protect[row] if nested else protect) for row in range(rows)]  # type: ignore


@torch.no_grad()
def run(
    model: PreTrainedModel,
    plan: Plan,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    protect: Spans = (),
    schedule: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Logits ``[B, forwards, vocab]`` as `feed` gives them, and how many (token, head) pairs were
    dropped on the way.
    """
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    oracle = Oracle(plan, ids, mask, protect)
    AttentionInterface.register(NAME, oracle.attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        cache = DynamicCache(config=model.config)
        return feed(model, cache, inputs, tokens, schedule), oracle.dropped
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def feed(
    model,
    cache,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    schedule: Sequence[int] | None = None,
) -> Tensor:
    """Feed the prompt and then `tokens` ``[B, steps]``; logits after each forward.

    Args:
        schedule: lengths of the forwards. None: the prompt in one, then each token but the last.

    Returns:
        ``[B, forwards, vocab]`` float32.
    """
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if schedule is None:
        schedule = [inputs["input_ids"].shape[1], *[1] * (tokens.shape[1] - 1)]
    logits, low = [], 0
    for length in schedule:
        high = low + length
        out = model(
            input_ids=ids[:, low:high],
            attention_mask=mask[:, :high],
            position_ids=positions[:, low:high],
            **as_argument(cache),
            use_cache=True,
        )
        logits.append(out.logits[:, -1].float())
        low = high
    return torch.stack(logits, 1)
