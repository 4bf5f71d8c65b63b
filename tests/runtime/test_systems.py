"""What the cache really holds under each recipe, against the paper's definition in float64.

`Truth` is a second implementation of every system: an attention function over `DynamicCache` that
notes what each query row paid to each token, and from that decides by loops what stays. It shares
no code with the scorers, the rules or the runtime.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from kvcompress.plan import Budget, FastGenChoice, Plan, Threshold, uniform
from kvcompress.recipe import Recipe, UniformPolicy
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.runtime.models import build, prompts
from tests.runtime.test_cache import feed, kept_numbers

NAME = "kvcompress_truth"
LENGTH = 90
SPECIAL, PUNCT = (30, 31, 32), tuple(range(40, 52))
RECIPES = Path(__file__).parents[2] / "recipes"
SYSTEMS = (
    "h2o h2o-mean h2o-lift value-aware scissorhands corm tova snapkv adakv criticalkv "
    "expected-attention keydiff random-keep-prompt fastgen-request"
).split()
# their score keeps growing in a way that the paper defines for every step
DECODING = ("h2o", "scissorhands", "tova", "expected-attention", "keydiff")


def plan_of(name: str, model, **changes) -> Plan:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    assert isinstance(recipe.policy, UniformPolicy)
    head = recipe.policy.head.model_copy(
        update={"k_dtype": "model", "v_dtype": "model", **changes.pop("head", {})}
    )
    settings = {**recipe.keep.model_dump(exclude={"per_request", "recall"}), **changes}
    settings.setdefault("per_request", recipe.keep.per_request)
    if name == "fastgen-request" and settings["per_request"].recovery == 0.95:
        settings["per_request"] = FastGenChoice(kind="fastgen", recovery=0.6)
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, head, special_ids=SPECIAL, punct_ids=PUNCT, **settings)


class Truth:
    """Attention that keeps its own books.

    Attributes:
        rows: by (layer, head), ``(t, {i: what each query head paid})`` of every row so far.
        kept: by (layer, head), tokens that are still there.
        told: what the runtime kept after each forward, by layer and head; where tokens tie, its
            choice among them is as good.
    """

    def __init__(self, name: str, plan: Plan, ids: list[int], told: list[list[set[int]]]) -> None:
        self.name, self.plan, self.ids, self.told = name, plan, ids, told
        self.rows: dict[tuple[int, int], list] = {}
        self.kept: dict[tuple[int, int], set[int]] = {}
        self.prompt_score: dict[tuple[int, int], dict[int, float]] = {}
        self.prompt_tokens = 0

    def attention(self, module, query, key, value, mask, scaling=None, **kwargs):
        layer, length, total = module.layer_idx, query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        for h in range(key.shape[1]):
            k, v = key[0, h].double(), value[0, h].double()
            for t in range(total - length, total):
                seen = sorted(self.kept.get((layer, h), set()) | set(range(total - length, t + 1)))
                q = query[0, h * group : (h + 1) * group, t - total].double()
                paid = (q @ k[seen].T * scaling).softmax(-1)
                out[0, h * group : (h + 1) * group, t - total] = paid @ v[seen]
                noted = dict(zip(seen, paid.T.tolist(), strict=True))
                self.rows.setdefault((layer, h), []).append((t, noted))
        heads = range(key.shape[1])
        if length > 1:
            self.prompt_tokens = length
            self.end_of_prompt(layer, module, query.double(), key.double(), value.double(), scaling)
        for h in heads:
            self.evict(layer, h, heads, total)
        return out.to(query.dtype).transpose(1, 2), None

    # ---- definitions: one number per token from the rows so far, larger stays
    def voting(self, layer, h):
        rows = self.rows[layer, h]
        if self.plan.score_rows is None:
            return rows
        return [r for r in rows if r[0] >= self.prompt_tokens - self.plan.score_rows]

    def sums(self, layer, h, i, weight=lambda t: 1.0):
        paid = [sum(noted[i]) / len(noted[i]) * weight(t)
                for t, noted in self.voting(layer, h) if i in noted]  # fmt: skip
        return sum(paid), len(paid)

    def score(self, layer, h, i, heads):
        name = self.name
        if name == "h2o":
            return self.sums(layer, h, i)[0]
        if name in ("h2o-mean", "h2o-lift"):
            total, count = self.sums(
                layer, h, i, (lambda t: t + 1) if name == "h2o-lift" else (lambda t: 1.0)
            )
            return total / count
        if name == "scissorhands":
            low = [sum(p < 1 / (t + 1) for p in noted[i]) / len(noted[i])
                   for t, noted in self.voting(layer, h) if i in noted]  # fmt: skip
            return -sum(low)
        if name == "corm":
            last = [t for t, noted in self.voting(layer, h)
                    if i in noted and max(noted[i]) >= 1 / (t + 1)]  # fmt: skip
            return max([i, *last]) - self.rows[layer, h][-1][0]
        if name == "tova":
            paid = [p for other in heads for p in self.rows[layer, other][-1][1][i]]
            return sum(paid) / len(paid)
        if name == "fastgen-request":
            total, count = self.sums(layer, h, i, lambda t: t + 1)
            return total / count
        known = self.prompt_score[layer, h]
        return known[i] if i in known else 1e9 + i

    def end_of_prompt(self, layer, module, query, key, value, scaling):
        """Scores of systems that look at a prompt once, by token."""
        n, count = self.prompt_tokens, key.shape[1]
        queries = query.unflatten(1, (count, -1))[0]
        for h in range(count):
            k, v = key[0, h], value[0, h]
            found = {}
            if self.name in ("snapkv", "adakv", "criticalkv"):
                mean = [self.sums(layer, h, i)[0] / 32 for i in range(n)]
                for i in range(n):
                    near = mean[max(0, i - 3) : i + 4]
                    found[i] = sum(near) / len(near)
            if self.name == "value-aware":
                found = {i: self.sums(layer, h, i)[0] * float(v[i].abs().sum()) for i in range(n)}
            if self.name == "keydiff":
                unit = k / k.norm(dim=-1, keepdim=True)
                anchor = unit.mean(0)
                found = {i: -float(unit[i] @ anchor / anchor.norm()) for i in range(n)}
            if self.name == "expected-attention":
                found = expected(queries[h], k, v, module, scaling)
            self.prompt_score[layer, h] = found
        if self.name == "criticalkv":
            self.project(layer, module, value[0])

    def project(self, layer, module, value):
        """CriticalKV: half of each head's budget first, then (A + ε) ‖W_O v‖₁."""
        weight, (count, n, width) = module.o_proj.weight.double(), value.shape
        group = weight.shape[1] // (count * width)
        for h in range(count):
            share = self.prompt_score[layer, h]
            size = {}
            for i in range(n):
                parts = [weight[:, (h * group + g) * width :][:, :width] for g in range(group)]
                size[i] = sum(float((part @ value[h, i]).abs().sum()) for part in parts) / group
            total = sum(share.values())
            second = {i: (a / total + 1e-4) * size[i] for i, a in share.items()}
            free = [i for i in share if 4 <= i < n - self.plan.recent_tokens]
            free.sort(key=lambda i: -share[i])
            budget = self.plan.heads[layer][h].frequent.resolve(n)
            first = set(free[: budget // 2])
            self.prompt_score[layer, h] = {
                i: 1e6 + a if i in first else second[i] * total for i, a in share.items()
            }

    # ---- what stays
    def evict(self, layer, h, heads, total):
        plan, head = self.plan, self.plan.heads[layer][h]
        held = self.kept.get((layer, h), set())
        held = held | set(range(max(held, default=-1) + 1, total))
        exact = set(range(plan.sink_tokens)) | set(range(total - plan.recent_tokens, total))
        exact &= held
        n = self.prompt_tokens
        window = head.local.resolve(n) if head.local else 0
        local = {i for i in held - exact if i >= total - window}
        rest = held - exact - local
        if self.name == "fastgen-request":
            self.kept[layer, h] = self.chain(layer, h, heads, held, exact, local)
            return
        room = head.frequent.resolve(n)
        if self.name in ("adakv", "criticalkv"):
            room = self.pooled(layer, heads, rest, room)[h]
        rank = {i: self.score(layer, h, i, heads) for i in sorted(rest)}
        if self.name == "random-keep-prompt":
            rank = {i: float(i < n) for i in rest}
        best = sorted(rest, key=lambda i: -rank[i])
        if self.name == "corm":
            room = min(room, sum(rank[i] >= -63 for i in rest))
        chosen = set(best[:room])
        theirs = self.told[total - self.prompt_tokens][layer * len(heads) + h] - exact - local
        if theirs <= rest and sorted(map(rank.get, theirs)) == sorted(map(rank.get, chosen)):
            chosen = theirs
        self.kept[layer, h] = exact | local | chosen

    def pooled(self, layer, heads, rest, budget):
        """AdaKV: the floors, then one token at a time to whoever has the best one left."""
        queues = [sorted((self.prompt_score[layer, h][i] for i in rest), reverse=True)
                  for h in heads]  # fmt: skip
        granted = [math.ceil(0.2 * budget)] * len(queues)
        while sum(granted) < budget * len(queues):
            best = max(range(len(queues)), key=lambda h: queues[h][granted[h]])
            granted[best] += 1
        return granted

    def chain(self, layer, h, heads, held, exact, local):
        """FastGen: the first keep-set that recovers enough of the last 64 rows."""
        plan, n = self.plan, self.prompt_tokens
        special = {i for i in held if self.ids[i] in SPECIAL}
        punct = {i for i in held if self.ids[i] in PUNCT}
        rank = {i: self.score(layer, h, i, heads) for i in held}
        head = plan.heads[layer][h]
        budget, window = head.frequent.resolve(n), head.local.resolve(n)

        def keep_set(place, t):
            past = {i for i in held if i <= t}
            always = {i for i in past if i < plan.sink_tokens or i > t - plan.recent_tokens}
            kept = always | (special & past)
            if place >= 1:
                kept |= punct & past
            if place == 3:
                kept |= {i for i in past if i > t - window}
            if place >= 2:
                rest = sorted(past - kept - special - punct, key=lambda i: -rank[i])
                kept |= set(rest[:budget])
            return past if place == 4 else kept

        for place in range(5):
            recovered = []
            for g in range(2):
                mass = [sum(noted[i][g] for i in keep_set(place, t))
                        for t, noted in self.rows[layer, h][-64:]]  # fmt: skip
                recovered.append(float(torch.quantile(torch.tensor(mass), 0.05)))
            if min(recovered) >= plan.per_request.recovery - 1e-9:
                return keep_set(place, n - 1)
        raise AssertionError("everything recovers everything")


def expected(queries, k, v, module, scaling):
    """Expected Attention of a Llama layer, whose RoPE turns channels (j, j + D/2)."""
    group, n, dim = queries.shape
    frequency = [10000.0 ** (-2 * j / dim) for j in range(dim // 2)]
    turn = torch.tensor([[p * f for f in frequency] for p in range(n)], dtype=torch.float64)
    future = torch.tensor([[(n - 1 + s) * f for f in frequency] for s in range(1, 513)])
    mean_turn = torch.exp(1j * future.double()).mean(0)
    share = torch.zeros(n, dtype=torch.float64)
    for g in range(group):
        pairs = torch.complex(queries[g, :, : dim // 2], queries[g, :, dim // 2 :])
        pairs = pairs * torch.exp(-1j * turn) * mean_turn
        turned = torch.cat([pairs.real, pairs.imag], -1)[4:]
        mu, sigma = turned.mean(0), torch.cov(turned.T, correction=0)
        z = torch.exp(k @ mu * scaling + (k @ sigma * k).sum(-1) * scaling**2 / 2)
        share += z / z[4:].sum()
    return dict(enumerate((share / group * v.norm(dim=-1)).tolist()))


@torch.no_grad()
def truth_of(name, model, plan, ids, told, length=LENGTH):
    """Per forward the logits, and what is kept at the end: a prompt, then single tokens."""
    truth = Truth(name, plan, ids[0].tolist(), told)
    AttentionInterface.register(NAME, truth.attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    cache = DynamicCache(config=model.config)
    logits = [model(input_ids=ids[:, :length], **as_argument(cache)).logits[:, -1]]
    kept = [[truth.kept[key] for key in sorted(truth.kept)]]
    for t in range(length, ids.shape[1]):
        logits.append(model(input_ids=ids[:, t : t + 1], **as_argument(cache)).logits[:, -1])
        kept.append([truth.kept[key] for key in sorted(truth.kept)])
    model.set_attn_implementation("eager")
    return torch.stack(logits, 1), kept


def runtime_of(model, plan, ids, length=LENGTH):
    attach(model, plan)
    cache = new_cache(model)
    logits = [feed(model, cache, ids[:, :length])[:, -1]]
    cache.finish_prompt(model)
    kept = [kept_numbers(cache)]
    for t in range(length, ids.shape[1]):
        logits.append(feed(model, cache, ids[:, t : t + 1])[:, -1])
        kept.append(kept_numbers(cache))
    detach(model)
    return torch.stack(logits, 1), kept


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_prompt_keeps_what_the_definition_keeps(name):
    model = build("llama")
    plan = plan_of(name, model)
    ids = prompts(1, LENGTH)["input_ids"]
    logits, kept = runtime_of(model, plan, ids)
    true_logits, true_kept = truth_of(name, build("llama", dtype=torch.float64), plan, ids, kept)
    assert kept == true_kept
    torch.testing.assert_close(logits.double(), true_logits, atol=2e-5, rtol=0)
    if name != "random-keep-prompt":  # the prompt is below its budget
        assert all(len(tokens) < LENGTH for tokens in kept[0])


@pytest.mark.parametrize("name", DECODING)
def test_decoding_goes_on_as_the_definition_does(name):
    """24 tokens after a prompt of 70, each of which takes a place from another."""
    model = build("llama")
    plan = plan_of(name, model)
    ids = prompts(1, 94)["input_ids"]
    logits, kept = runtime_of(model, plan, ids, 70)
    true_logits, true_kept = truth_of(
        name, build("llama", dtype=torch.float64), plan, ids, kept, 70
    )
    assert kept == true_kept
    torch.testing.assert_close(logits.double(), true_logits, atol=2e-5, rtol=0)
    assert all(len(tokens) == len(kept[0][0]) for tokens in kept[-1])


def generous(name, model):
    """The recipe with room for every token, however little it is worth."""
    plan = plan_of(name, model)
    head = {"frequent": Budget(tokens=200)}
    if name == "corm":
        return plan_of(
            name, model, head=head, per_request=Threshold(kind="threshold", at_least=-1e9)
        )
    if name == "fastgen-request":
        everything = FastGenChoice(kind="fastgen", recovery=1.0)
        return plan_of(name, model, per_request=everything)
    return plan_of(name, model, head=head, per_request=plan.per_request)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_budget_as_large_as_the_prompt_is_dynamic_cache(name):
    model = build("llama")
    ids = prompts(1, 94)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        plain = [model(input_ids=ids[:, :80], **as_argument(cache)).logits[:, -1]]
        for t in range(80, 94):
            plain.append(model(input_ids=ids[:, t : t + 1], **as_argument(cache)).logits[:, -1])
    logits, kept = runtime_of(model, generous(name, model), ids, 80)
    assert kept[-1] == [set(range(94))] * 4
    torch.testing.assert_close(logits, torch.stack(plain, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_padded_row_keeps_what_it_keeps_alone(name):
    model = build("llama")
    plan = plan_of(name, model)
    inputs = prompts(3, LENGTH, [11, 0, 4])
    attach(model, plan)
    cache = new_cache(model)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.finish_prompt(model)
    for row, pad in enumerate([11, 0, 4]):
        alone = new_cache(model)
        feed(model, alone, inputs["input_ids"][row : row + 1, pad:])
        alone.finish_prompt(model)
        assert kept_numbers(cache, row) == kept_numbers(alone)
