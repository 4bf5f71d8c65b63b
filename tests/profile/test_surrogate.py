"""The surrogate's training: planted weights come back, R² says so, a stopped run goes on."""

import pytest
import torch

from kvcompress.errors import CalibrationError, PlanError
from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile import surrogate
from kvcompress.profile.repeat import ScoredContext
from kvcompress.profile.run import run, run_and_plan
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile
from kvcompress.profile.surrogate import Errors, Moments, contexts_of, samples, train
from kvcompress.profile.workplace import Workplace
from kvcompress.recipe import Calibration, FastGenPolicy, Keep, Recipe, UniformPolicy
from kvcompress.runtime.model.families import shape_of

HEADS, HIDDEN = 2, 12
UNIFORM = UniformPolicy(kind="uniform", head=HeadPlan(frequent=Budget(ratio=0.25)))
RECIPE = Recipe(
    calibration=Calibration(prompts=4, tokens=128), keep=Keep(scorer="surrogate"), policy=UNIFORM
)


def planted(tokens, weight, noise=0.0, seed=0, layer=0):
    """A context whose log scores are linear in its inputs, whose channels differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.linspace(-2, 1, HIDDEN)
    hidden = (torch.randn(tokens, HIDDEN, generator=generator) + 1.0) * scale
    log = hidden.double() @ weight[:, :-1].mT + weight[:, -1]
    log = log + noise * torch.randn(log.shape, generator=generator)
    seen = torch.ones(tokens, dtype=torch.bool)
    return ScoredContext(layer, hidden, log.exp().mT.contiguous(), seen)


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(7)
    scale = 10.0 ** torch.linspace(2, -1, HIDDEN, dtype=torch.float64)
    own = torch.randn(HEADS, HIDDEN, dtype=torch.float64, generator=generator) * scale * 0.1
    return torch.cat([own, torch.full((HEADS, 1), -4.0, dtype=torch.float64)], 1)


def test_planted_weights_come_back_from_moments_that_came_in_parts(weight):
    moments = Moments.of(planted(200, weight, seed=1))
    for seed in (2, 3):
        moments.add(Moments.of(planted(200, weight, seed=seed)))
    found = moments.fit(1e-12)
    # scores down to 1e-8 alone are linear; the floor is not reached by these
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)
    errors = Errors.of(planted(300, weight, seed=4), found[None])
    torch.testing.assert_close(errors.r2(), torch.ones(1, HEADS, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_fit_is_ridge_regression_on_standardised_channels(weight, ridge):
    contexts = [planted(60, weight, noise=0.5, seed=s) for s in (1, 2)]
    moments = Moments.of(contexts[0])
    moments.add(Moments.of(contexts[1]))
    parts = [samples(c) for c in contexts]
    x = torch.cat([p[0] for p in parts])[:, :-1]
    y = torch.cat([p[1] for p in parts])
    mean, scale = x.mean(0), x.std(0, correction=0)
    # least squares with sqrt(n λ) of the identity below the standardised inputs
    below = (ridge * len(x)) ** 0.5 * torch.eye(HIDDEN, dtype=torch.float64)
    stacked = torch.cat([(x - mean) / scale, below])
    target = torch.cat([y - y.mean(0), torch.zeros(HIDDEN, HEADS, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, target).solution.mT / scale
    found = moments.fit(ridge)
    torch.testing.assert_close(found[:, :-1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, -1], y.mean(0) - expected @ mean, rtol=1e-5, atol=1e-5)


def test_errors_and_r2_against_plain_sums(weight):
    context = planted(80, weight, noise=1.0)
    students = torch.stack([weight, weight * 0.5, torch.zeros_like(weight)])
    first = ScoredContext(0, context.hidden[:30], context.score[:, :30], context.seen[:30])
    rest = ScoredContext(0, context.hidden[30:], context.score[:, 30:], context.seen[30:])
    found = Errors.of(first, students).plus(Errors.of(rest, students)).r2()
    y = context.score.double().clamp(min=surrogate.FLOOR).log()
    for student in range(3):
        for head in range(HEADS):
            own = students[student, head]
            guess = context.hidden.double() @ own[:-1] + own[-1]
            expected = 1 - (y[head] - guess).square().mean() / y[head].var(correction=0)
            assert float(found[student, head]) == pytest.approx(float(expected), rel=1e-9)


def test_a_channel_that_never_moves_gets_no_weight(weight):
    context = planted(100, weight)
    context.hidden[:, 3] = 5.0
    found = Moments.of(context).fit(1e-3)
    assert found.isfinite().all() and (found[:, 3] == 0).all()


def test_unseen_tokens_are_left_out_and_tiny_scores_count_as_the_floor(weight):
    context = planted(20, weight)
    context.score[:, 5] = 0.0
    context.seen[:5] = False
    x, y = samples(context)
    assert len(x) == len(y) == 15
    assert y[0, 0] == pytest.approx(float(torch.tensor(surrogate.FLOOR).log()))


def test_both_halves_fit_the_model_when_read_twice():
    halves = contexts_of([0, *range(10, 137)], 1)
    assert [len(h) for h in halves] == [64, 64]
    assert halves[0] == [0, *range(10, 73)] and halves[1] == [0, *range(73, 136)]


# ---- on a model
@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama, tiny_tokenizer):
    out = tmp_path_factory.mktemp("profiles") / "p"
    return out, run_and_plan(llama, tiny_tokenizer, RECIPE, out, also=["losses"])


def test_a_profile_holds_weights_and_r2(finished, llama):
    out, plan = finished
    profile = Profile.load(out)
    weights = profile.load_params(out).scorer["surrogate"]
    assert [tuple(w.shape) for w in weights] == [(2, 65)] * 2
    assert len(profile.surrogate_r2) == 2 and all(len(row) == 2 for row in profile.surrogate_r2)
    # random weights: what the keys say is in the inputs, but little data; better than the mean
    assert max(max(row) for row in profile.surrogate_r2) > 0.05
    assert plan.scorer == "surrogate" and not plan.repeat_ids


def test_a_stopped_training_goes_on_and_scores_nothing_twice(
    tmp_path, finished, llama, tiny_tokenizer, monkeypatch
):
    scored = []
    original = surrogate.score_context

    def counted(model, shape, context, *rest):
        if len(scored) == 5:  # two contexts of each prompt: in the third, the last trained on
            raise KeyboardInterrupt
        scored.append(context)
        return original(model, shape, context, *rest)

    monkeypatch.setattr(surrogate, "score_context", counted)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tiny_tokenizer, RECIPE, tmp_path / "p", also=["losses"])
    scored.clear()
    steps = []
    profile = run(
        llama,
        tiny_tokenizer,
        RECIPE,
        tmp_path / "p",
        lambda *s: steps.append(s),
        also=["losses"],
    )
    assert len(scored) == 4  # the third prompt again, and the one held out
    assert profile == Profile.load(finished[0])
    assert steps[-1] == (45, 45)
    left = profile.load_params(tmp_path / "p").scorer["surrogate"]
    right = profile.load_params(finished[0]).scorer["surrogate"]
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert not (tmp_path / "p" / "prompts").exists()


def test_nothing_on_disk_is_as_large_as_the_hidden_states_or_holds_tokens(tmp_path, llama):
    shape = shape_of(llama.config, llama.dtype)
    prompts = [torch.randint(3, 259, (128,)).tolist() for _ in range(4)]
    place = Workplace(tmp_path / "p", {})
    train(llama, shape, prompts, 1, place, lambda steps: None)
    kept = {p.name: p.stat().st_size for p in (tmp_path / "p" / "prompts").iterdir()}
    assert sorted(kept) == ["0003.surrogate.safetensors", "surrogate.safetensors"]
    assert kept["surrogate.safetensors"] < 2 * 8 * (65 * 65 + 65 * 2) + 2000
    assert kept["0003.surrogate.safetensors"] < 2000


def test_losses_are_measured_with_the_trained_surrogate(tmp_path, finished, llama, tiny_tokenizer):
    mine = Profile.load(finished[0])
    other = RECIPE.model_copy(update={"keep": Keep(scorer="random")})
    random = run(llama, tiny_tokenizer, other, tmp_path / "p", also=["losses"])
    column = [i for i, h in enumerate(mine.candidates) if h.frequent and not h.local]
    assert random.surrogate_r2 is None
    assert column and mine.losses != random.losses
    full = [i for i, h in enumerate(mine.candidates) if h.full]
    for i in full:
        assert mine.losses[0][0][i] == random.losses[0][0][i]


def test_one_prompt_is_too_few(tmp_path, llama, tiny_tokenizer):
    recipe = RECIPE.model_copy(update={"calibration": Calibration(prompts=1, tokens=128)})
    with pytest.raises(CalibrationError, match="set calibration.prompts to 2 or more"):
        run(llama, tiny_tokenizer, recipe, tmp_path / "p")


def test_a_profile_cannot_rank_by_a_scorer_that_repeats(finished):
    profile = Profile.load(finished[0])
    keep = Keep(scorer="kvzip")
    plan = solve(profile, UNIFORM, keep)
    assert plan.repeat_ids == profile.repeat_ids and plan.repeat_ids
    assert plan.predicted_loss is None
    twice = profile.model_copy(update={"recipe": RECIPE.model_copy(update={"keep": keep})})
    assert solve(twice, UNIFORM).predicted_loss is None
    with pytest.raises(PlanError, match="cannot rank by kvzip, which repeats it"):
        solve(twice, FastGenPolicy(kind="fastgen"), keep)
