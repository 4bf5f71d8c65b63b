"""Policies over a profile made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.accounting import head_bytes, kv_bytes, prefill_bytes
from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, ModelShape
from kvcompress.profile.candidates import (
    candidates,
    codes_nothing,
    fastgen_ladder,
    fastgen_policy,
    small_candidates,
)
from kvcompress.profile.options import policy_from_options
from kvcompress.profile.solve import solve
from kvcompress.profile.store import ExactSetting, Profile, Provenance
from kvcompress.recipe import PARTS, BytesPolicy, FastGenPolicy, Keep, Recipe, UniformPolicy
from kvcompress.runtime.layer.relative import check_relative

LAYERS, HEADS = 2, 2
SHAPE = ModelShape(
    model_type="llama",
    config_hash="0" * 64,
    layers=LAYERS,
    query_heads=4,
    kv_heads=HEADS,
    head_dim=64,
    sliding_windows=(None,) * LAYERS,
    max_position=2048,
)
CANDIDATES = candidates(Recipe(), 64)
NEEDS = ((1.0, 10.0), (100.0, 0.01))  # how much each head suffers


def hurt(head: HeadPlan) -> float:
    """A loss that falls with tokens and bits."""
    if codes_nothing(head):
        return 1.0
    dropped = 0.0
    if not head.full:
        budgets = [b.ratio for b in (head.frequent, head.local) if b]
        dropped = 0.9 * (1 - sum(budgets) / 2) - 0.05 * head.special - 0.05 * head.punct
    bits = {"model": 0.0, "int8": 1e-4, "fp8": 1e-3, "int4": 1e-2}
    bits |= {"rot4": 0.008, "rot3": 0.03, "rot2": 0.1}
    return dropped + bits[head.k_dtype] + bits[head.v_dtype]


def profile_of(recipe=None, recovery=None) -> Profile:
    recipe = recipe or Recipe()
    reached = recovery or tuple(
        tuple((0.5, 0.6, 0.9 if head else 0.96, 0.97, 1.0) for head in range(HEADS))
        for _ in range(LAYERS)
    )
    return Profile(
        parts=PARTS,
        model="by hand",
        shape=SHAPE,
        recipe=recipe,
        provenance=Provenance(
            data="builtin",
            data_hash="",
            weights_hash="",
            prompts=1,
            prompt_tokens=1024,
            held_out_rows=64,
            device="cpu",
            dtype="bfloat16",
            versions={},
        ),
        tokenizer_hash="",
        weight_bytes={"bf16": 1_000_000, "int8": 600_000, "nf4": 300_000},
        special_ids=(0,),
        punct_ids=(5, 6),
        special_share=0.001,
        punct_share=0.15,
        rotations=("none",) * LAYERS,
        chain=fastgen_ladder(fastgen_policy(recipe)),
        recovery=reached,
        recovery_l1=tuple(tuple(tuple(2 * (1 - m) for m in h) for h in row) for row in reached),
        candidates=CANDIDATES,
        losses=tuple(
            tuple(tuple(need * hurt(h) for h in CANDIDATES) for need in layer) for layer in NEEDS
        ),
        loss_unit="nats",
    )


PROFILE = profile_of()


def bytes_policy(**settings):
    return BytesPolicy(kind="bytes", **settings)


@given(st.integers(100, 1000), st.integers(100, 1000), st.sampled_from([256, 1024, 2048]))
def test_byte_plans_fit_and_more_bytes_never_predict_worse(first, second, context):
    plans = []
    for ratio in sorted((first / 1000, second / 1000)):
        plan = solve(PROFILE, bytes_policy(keep_ratio=ratio, context=context, batch=3))
        assert kv_bytes(plan, context, 3) <= ratio * SHAPE.bf16_kv_bytes(context, 3)
        plans.append(plan)
    assert plans[1].predicted_loss <= plans[0].predicted_loss


def test_the_needy_head_gets_the_bytes():
    plan = solve(PROFILE, bytes_policy(keep_ratio=0.2))
    needy, frugal = head_bytes(plan, 1, 0, 1024, 1), head_bytes(plan, 1, 1, 1024, 1)
    assert plan.heads[1][0].full and needy > 3 * frugal
    assert kv_bytes(plan, 1024, 1) > 0.18 * SHAPE.bf16_kv_bytes(1024, 1)
    assert plan.target == "0.2 of the bf16 KV bytes at 1024 tokens, batch 1"


def test_only_the_listed_storage_is_used():
    plan = solve(PROFILE, bytes_policy(keep_ratio=0.9, dtypes=(("int4", "int4"),)))
    assert {(h.k_dtype, h.v_dtype) for row in plan.heads for h in row} == {("int4", "int4")}
    assert all(h.full for row in plan.heads for h in row)


def test_codes_that_a_width_cannot_have_are_left_out():
    """Heads of 100 channels have no third bits and no four codes to a byte, as a default asks."""
    few = candidates(Recipe(), 100)
    columns = [CANDIDATES.index(head) for head in few]
    assert {h.v_dtype for h in few} == {"model", "int8", "int4", "fp8", "rot4", "rot2"}
    losses = tuple(
        tuple(tuple(row[c] for c in columns) for row in layer) for layer in PROFILE.losses
    )
    shape = SHAPE.model_copy(update={"head_dim": 100})
    narrow = {"shape": shape, "candidates": few, "losses": losses}
    plan = solve(PROFILE.model_copy(update=narrow), bytes_policy(keep_ratio=0.3))
    assert plan.heads
    with pytest.raises(PlanError, match="dtypes rot3/rot3 were not measured"):
        solve(
            PROFILE.model_copy(update=narrow),
            bytes_policy(keep_ratio=0.3, dtypes=(("rot3", "rot3"),)),
        )


def test_storage_that_was_not_measured_is_refused():
    with pytest.raises(PlanError, match="dtypes fp8/int4 were not measured"):
        solve(PROFILE, bytes_policy(keep_ratio=0.5, dtypes=(("fp8", "int4"),)))


def test_memory_counts_weights_and_one_layer_of_prefill():
    fixed = 1_000_000 + prefill_bytes(SHAPE, 1024, 1)
    plan = solve(PROFILE, bytes_policy(memory="2MiB"))
    assert fixed + kv_bytes(plan, 1024, 1) <= 2 * 2**20
    smaller = solve(PROFILE, bytes_policy(memory="2MiB"), weights="nf4")
    assert kv_bytes(smaller, 1024, 1) > kv_bytes(plan, 1024, 1)


def test_an_impossible_target_says_what_is_missing():
    with pytest.raises(PlanError, match=r"500KiB in all .*: 512000 bytes are (\d+) too few") as hit:
        solve(PROFILE, bytes_policy(memory="500KiB"))
    needed = int(str(hit.value).split("needs ")[1].split()[0])
    assert "1524288 for weights and prefill" in str(hit.value)
    enough = solve(PROFILE, bytes_policy(memory=f"{needed}B"))
    assert 1_524_288 + kv_bytes(enough, 1024, 1) <= needed
    with pytest.raises(PlanError, match="512 bytes|bytes are 1 too few"):
        solve(PROFILE, bytes_policy(memory=f"{needed - 1}B"))


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(PlanError, match="context 4096 is beyond the 2048 positions"):
        solve(PROFILE, bytes_policy(keep_ratio=0.5, context=4096))


def test_fastgen_takes_the_first_keep_set_that_recovers_enough():
    plan = solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=0.95))
    labels = [[h.label for h in row] for row in plan.heads]
    three, four = "special+punct+frequent 0.3", "special+punct+frequent 0.3+local 0.3"
    assert labels == [[three, four]] * LAYERS
    assert plan.predicted_loss is not None
    low = solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=0.5))
    assert {h.label for row in low.heads for h in row} == {"special"}
    high = solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=0.99, k_dtype="int4"))
    assert {(h.label, h.storage) for row in high.heads for h in row} == {("full", "k4v8")}


def test_the_l1_reading_asks_for_more():
    """‖A − Â‖₁ ≤ 0.05 is a mass of 0.975, which only the full cache of this profile has."""
    plan = solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=0.95, reading="l1"))
    assert all(h.full for row in plan.heads for h in row)
    loose = solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=0.9, reading="l1"))
    assert not any(h.full for row in loose.heads for h in row)


def test_a_higher_recovery_never_takes_fewer_bytes():
    sizes = [
        kv_bytes(solve(PROFILE, FastGenPolicy(kind="fastgen", recovery=t / 100)), 1024, 1)
        for t in range(1, 101)
    ]
    assert sizes == sorted(sizes)


def test_other_fastgen_ratios_need_another_profile():
    policy = FastGenPolicy(kind="fastgen", frequent_ratio=0.2)
    with pytest.raises(PlanError, match=r"frequent_ratio 0\.3 .* asks for frequent_ratio 0\.2"):
        solve(PROFILE, policy)


def test_uniform_plans_predict_a_loss_where_it_was_measured():
    int8 = solve(PROFILE, UniformPolicy(kind="uniform", head=HeadPlan(full=True)))
    expected = sum(need for row in NEEDS for need in row) * hurt(HeadPlan(full=True))
    assert int8.predicted_loss == pytest.approx(expected)
    odd = UniformPolicy(kind="uniform", head=HeadPlan(local=Budget(tokens=77)))
    assert solve(PROFILE, odd).predicted_loss is None


def test_other_sinks_or_scorers_need_another_profile():
    with pytest.raises(PlanError, match=r"keep.scorer lift, asked for is raw; measure it: kvc"):
        solve(PROFILE, bytes_policy(keep_ratio=0.5), Keep(scorer="raw"))
    plan = solve(
        PROFILE, UniformPolicy(kind="uniform", head=HeadPlan(full=True)), Keep(scorer="raw")
    )
    assert plan.scorer == "raw" and plan.predicted_loss is None


def test_the_recipe_decides_where_nothing_is_asked_for():
    own = bytes_policy(keep_ratio=0.3, context=512)
    plan = solve(profile_of(Recipe(policy=own)))
    assert plan.target == "0.3 of the bf16 KV bytes at 512 tokens, batch 1"
    assert plan.special_ids == (0,) and plan.punct_share == 0.15


def options(own, **given):
    names = ("memory", "keep_ratio", "recovery", "context", "batch")
    return policy_from_options(own, **{name: given.get(name) for name in names})


def test_options_replace_what_they_name():
    fastgen, size = (
        FastGenPolicy(kind="fastgen", k_dtype="int4"),
        bytes_policy(memory="1GiB", batch=4),
    )
    assert options(fastgen) is fastgen
    assert options(fastgen, recovery=0.9) == fastgen.model_copy(update={"recovery": 0.9})
    assert options(size, keep_ratio=0.5) == bytes_policy(keep_ratio=0.5, batch=4)
    assert options(size, context=99) == bytes_policy(memory="1GiB", batch=4, context=99)
    assert options(fastgen, memory="2GiB", batch=2) == bytes_policy(memory="2GiB", batch=2)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"memory": "1GiB", "recovery": 0.9}, "two targets at once"),
        ({"context": 100}, "belong to a byte target"),
        ({"recovery": 0.9, "batch": 2}, "--recovery takes no --context"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"recovery": 0.0}, "recovery"),
        ({"memory": "8GB"}, "write 8GiB"),
        ({"keep_ratio": 0.5, "batch": 0}, "batch"),
    ],
)
def test_unusable_options_are_refused(given, message):
    with pytest.raises(PlanError, match=message):
        options(FastGenPolicy(kind="fastgen"), **given)


def with_fewer_exact(profile=PROFILE):
    """A setting that predicts less, so that it is chosen wherever bytes are scarce."""
    heads = small_candidates(Recipe(), 64)
    setting = ExactSetting(
        sink_tokens=1,
        recent_tokens=2,
        candidates=heads,
        losses=tuple(
            tuple(tuple(need * hurt(h) * (1 if h.full else 0.9) for h in heads) for need in layer)
            for layer in NEEDS
        ),
    )
    return profile.model_copy(update={"fewer": (setting,)})


FEWER = with_fewer_exact()


def test_fewer_exact_tokens_are_chosen_where_they_predict_less():
    small = solve(FEWER, bytes_policy(keep_ratio=1 / 16))
    assert (small.sink_tokens, small.recent_tokens) == (1, 2)
    assert kv_bytes(small, 1024, 1) <= SHAPE.bf16_kv_bytes(1024, 1) / 16
    own = solve(FEWER, bytes_policy(keep_ratio=1 / 16, fewer_exact=False))
    assert (own.sink_tokens, own.recent_tokens) == (4, 16)
    assert small.predicted_loss < own.predicted_loss
    with pytest.raises(PlanError, match="bytes are .* too few"):
        solve(FEWER, bytes_policy(keep_ratio=1 / 64, fewer_exact=False))
    assert solve(FEWER, bytes_policy(keep_ratio=1 / 64)).recent_tokens == 2


@given(st.integers(15, 1000), st.integers(15, 1000))
def test_more_bytes_never_predict_worse_over_all_settings(first, second):
    low, high = sorted((first / 1000, second / 1000))
    plans = [solve(FEWER, bytes_policy(keep_ratio=ratio)) for ratio in (low, high)]
    assert plans[1].predicted_loss <= plans[0].predicted_loss


NARROWER = (
    {"dtypes": (("model", "model"),)},
    {"dtypes": (("int8", "int8"),)},
    {"keep_sets": "full"},
    {"keep_sets": "local"},
    {"fewer_exact": False},
)


@pytest.mark.parametrize("part", NARROWER, ids=str)
@pytest.mark.parametrize("ratio", [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 40])
def test_joint_is_never_worse_than_a_part_of_it(ratio, part):
    dtypes = (("model", "model"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
    joint = solve(FEWER, bytes_policy(keep_ratio=ratio, dtypes=dtypes))
    try:
        alone = solve(FEWER, bytes_policy(keep_ratio=ratio, **({"dtypes": dtypes} | part)))
    except PlanError:
        return  # the part alone cannot be that small
    assert joint.predicted_loss <= alone.predicted_loss


def test_parts_keep_to_their_keep_sets():
    full = solve(PROFILE, bytes_policy(keep_ratio=0.5, keep_sets="full"))
    assert all(h.full for row in full.heads for h in row)
    local = solve(PROFILE, bytes_policy(keep_ratio=0.2, keep_sets="local"))
    assert not any(h.frequent or h.punct for row in local.heads for h in row)


def test_relative_positions_bound_every_head_and_serve_longer_contexts():
    keep = Keep(positions="relative")
    profile = profile_of(Recipe(keep=keep))
    plan = solve(profile, bytes_policy(keep_ratio=0.1, context=8192), keep)
    assert plan.positions == "relative"
    most = [b.tokens for row in plan.heads for h in row for b in (h.frequent, h.local) if b]
    assert most and all(tokens is not None and tokens <= 1024 for tokens in most)
    check_relative(plan)
    assert kv_bytes(plan, 8192, 1) == kv_bytes(plan, 100_000, 1)
    assert kv_bytes(plan, 8192, 1) <= 0.1 * SHAPE.bf16_kv_bytes(8192, 1)
    with pytest.raises(PlanError, match="or a recipe with keep.positions: relative"):
        solve(PROFILE, bytes_policy(keep_ratio=0.1, context=8192))


def test_what_budgets_follow_the_prompt_from():
    small = bytes_policy(keep_ratio=0.3, keep_sets="local")
    plans = {
        budgets: solve(PROFILE, small.model_copy(update={"budgets": budgets}))
        for budgets in ("from_context", "ratio", "tokens")
    }
    windows = {
        budgets: [h.local for row in plan.heads for h in row if h.local]
        for budgets, plan in plans.items()
    }
    assert windows["ratio"]
    for grown, share, fixed in zip(*windows.values(), strict=True):
        assert share.resolve(1024) == fixed.tokens
        for length in (1, 40, 512, 1024, 1500, 4096):
            assert grown.resolve(length) == share.resolve(max(length, 1024))
    assert len({plan.predicted_loss for plan in plans.values()}) == 1
    held = {budgets: kv_bytes(plan, 512, 1) for budgets, plan in plans.items()}
    assert held["ratio"] < held["from_context"] == held["tokens"]
    held = {budgets: kv_bytes(plan, 1024, 1) for budgets, plan in plans.items()}
    assert len(set(held.values())) == 1
    held = {budgets: kv_bytes(plan, 2048, 1) for budgets, plan in plans.items()}
    assert held["ratio"] == held["from_context"] > held["tokens"]
