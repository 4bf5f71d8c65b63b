"""Recovery against brute force, and heads whose structure is planted."""

import torch

from kvcompress.plan import HeadPlan
from kvcompress.profile.candidates import fastgen_ladder
from kvcompress.profile.masks import KeepMasks
from kvcompress.profile.measure import head_recovery, kept_mass, l1_distance, over_prompts
from kvcompress.recipe import FastGenPolicy, Keep
from tests.profile.rows import attention_of, random_rows, rows_of

CHAIN = fastgen_ladder(FastGenPolicy(kind="fastgen"))


def no_classes(rows):
    none = torch.zeros(rows.key.shape[1], dtype=torch.bool)
    special = none.clone()
    special[0] = True
    return KeepMasks(rows, Keep(), special, none)


def test_recovery_is_brute_force_mass():
    rows = random_rows()
    masks = no_classes(rows)
    attention = attention_of(rows)
    for plan in CHAIN:
        kept = masks.kept(plan).expand(2, -1, -1)
        expected = []
        for head in range(2):
            worst = []
            for query_head in range(2):
                mass = [
                    float(attention[head, query_head, w][kept[head, w]].sum())
                    for w in range(attention.shape[2])
                ]
                worst.append(torch.quantile(torch.tensor(mass, dtype=torch.float64), 0.05))
            expected.append(min(worst))
        got = head_recovery(kept_mass(attention, masks.kept(plan)))
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_l1_reading_follows_from_the_mass():
    rows = random_rows()
    attention, kept = attention_of(rows), no_classes(rows).kept(CHAIN[2]).unsqueeze(1)
    mass = kept_mass(attention, kept[:, 0])
    renormalised = attention * kept / mass.unsqueeze(-1)
    direct = (attention - renormalised).abs().sum(-1)
    torch.testing.assert_close(l1_distance(mass), direct, rtol=1e-12, atol=1e-12)


def test_the_chain_recovers_more_and_more_and_at_last_all():
    rows = random_rows()
    masks, attention = no_classes(rows), attention_of(rows)
    reached = torch.stack([head_recovery(kept_mass(attention, masks.kept(p))) for p in CHAIN], -1)
    assert (reached.diff(dim=-1) >= -1e-12).all()
    torch.testing.assert_close(reached[:, -1], torch.ones(2, dtype=torch.float64))


def first_hit(rows, recovery=0.95) -> HeadPlan:
    masks, attention = no_classes(rows), attention_of(rows)
    for plan in CHAIN:
        if head_recovery(kept_mass(attention, masks.kept(plan)))[0] >= recovery:
            return plan
    raise AssertionError("full recovers everything")


def test_a_head_that_looks_at_sinks_gets_the_special_keep_set():
    tokens, dim = 400, 8
    key = torch.zeros(1, tokens, dim)
    key[:, 0, 0] = 1.0
    query = torch.zeros(1, 2, tokens, dim)
    query[..., 0] = 20.0  # e^20 against 399 others
    assert first_hit(rows_of(query, key)) == CHAIN[0]


def test_a_head_that_looks_at_random_old_tokens_stays_full():
    """As induction does: each held-out row needs one token that no earlier row has asked for."""
    torch.manual_seed(0)
    tokens, dim = 400, 64
    key = torch.nn.functional.normalize(torch.randn(1, tokens, dim), dim=-1)
    query = torch.zeros(1, 1, tokens, dim)
    targets = torch.randperm(300)[:64] + 10
    query[0, 0, -64:] = 60 * key[0, targets]
    assert first_hit(rows_of(query, key)).full


def test_one_diffuse_query_head_decides_for_its_group():
    tokens, dim = 400, 8
    key = torch.zeros(1, tokens, dim)
    key[:, 0, 0] = 1.0
    query = torch.zeros(1, 2, tokens, dim)
    query[:, 0, :, 0] = 20.0  # looks at the sink; its neighbour looks at everything
    assert first_hit(rows_of(query, key)).full


def test_prompts_are_read_at_their_low_quantile():
    recovery = torch.linspace(0.5, 1.0, 21)[:, None, None, None].repeat(1, 1, 1, 2)
    recovery[..., 1] -= 0.01  # noise: a larger keep-set cannot recover less
    torch.testing.assert_close(over_prompts(recovery), torch.full((1, 1, 2), 0.525))
