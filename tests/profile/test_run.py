"""The whole profiler on a tiny model: numbers, going on after a stop, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kvcompress.errors import CalibrationError, PlanError, ProfileError
from kvcompress.plan import Plan
from kvcompress.profile import parts as profiler
from kvcompress.profile import report
from kvcompress.profile.run import run, run_and_plan
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile
from kvcompress.recipe import BytesPolicy, Calibration, Keep, Recipe
from tests.profile.conftest import model_of

RECIPE = Recipe(
    calibration=Calibration(prompts=3, tokens=256),
    policy=BytesPolicy(kind="bytes", keep_ratio=0.4, context=256),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama, tiny_tokenizer):
    out = tmp_path_factory.mktemp("profiles") / "p"
    return out, run_and_plan(llama, tiny_tokenizer, RECIPE, out, also=["recovery"])


def test_a_profile_directory_is_complete(finished, llama):
    out, plan = finished
    names = sorted(p.name for p in out.iterdir())
    assert names == ["kv_params.safetensors", "plan.json", "profile.json", "settings.json"]
    profile = Profile.load(out)
    assert profile.rotations == ("half-split, 16 channels",) * 2
    assert Plan.load(out) == plan == solve(profile)
    params = profile.load_params(out)
    assert [tuple(s.shape) for s in params.k_scale] == [(2, 16)] * 2
    assert profile.weight_bytes["bf16"] == 2 * sum(p.numel() for p in llama.parameters())
    assert profile.weight_bytes["nf4"] < profile.weight_bytes["int8"] < profile.weight_bytes["bf16"]


def test_constants_of_another_profile_are_refused(finished, tmp_path):
    out, _ = finished
    copy = tmp_path / "p"
    shutil.copytree(out, copy)
    profile = Profile.load(copy)
    constants = profile.load_params(copy)
    replace(constants, k_scale=tuple(s * 2 for s in constants.k_scale)).save(
        copy / "kv_params.safetensors"
    )
    with pytest.raises(ProfileError, match="not the key constants of this profile"):
        profile.load_params(copy)
    old = profile.model_copy(update={"params_sha256": None})  # made before it was noted
    assert torch.equal(old.load_params(copy).k_scale[0], 2 * constants.k_scale[0])


def test_numbers_are_sane(finished):
    profile = Profile.load(finished[0])
    recovery = torch.tensor(profile.recovery)
    assert (recovery.diff(dim=-1) >= 0).all() and (recovery[..., 0] > 0).all()
    torch.testing.assert_close(recovery[..., -1], torch.ones(2, 2))
    torch.testing.assert_close(
        torch.tensor(profile.recovery_l1), 2 * (1 - recovery), rtol=0, atol=1e-5
    )
    column = {(h.label, h.storage): i for i, h in enumerate(profile.candidates)}
    losses = torch.tensor(profile.losses)
    ordered = [("full", "model"), ("full", "int8"), ("full", "rot3"), ("local 0.03", "rot3")]
    steps = losses[..., [column[name] for name in ordered]]
    assert (steps.diff(dim=-1) > 0).all()


def test_no_calibration_text_is_stored(finished):
    text = (finished[0] / "profile.json").read_text()
    assert "Note:" not in text and "statement" not in text


class StopError(Exception):
    pass


def test_a_stopped_run_goes_on_and_measures_nothing_twice(
    tmp_path, finished, llama, tiny_tokenizer, monkeypatch
):
    measured = []
    original = profiler.measure_prompt

    def counted(model, setup, ids):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(ids)
        return original(model, setup, ids)

    monkeypatch.setattr(profiler, "measure_prompt", counted)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tiny_tokenizer, RECIPE, tmp_path / "p", also=["recovery"])
    with pytest.raises(ProfileError, match="unfinished, run the same profile command again"):
        Profile.load(tmp_path / "p")
    kept = sorted(p.name for p in (tmp_path / "p" / "prompts").iterdir())
    assert [name for name in kept if "keys" not in name] == [
        f"000{i}.recovery+losses.safetensors" for i in range(2)
    ]

    measured.clear()
    steps = []
    profile = run(
        llama,
        tiny_tokenizer,
        RECIPE,
        tmp_path / "p",
        lambda *s: steps.append(s),
        also=["recovery"],
    )
    assert len(measured) == 1
    assert profile == Profile.load(finished[0])
    assert steps[-1] == (28, 28) and steps == sorted(steps)
    left, right = (load_file(p / "kv_params.safetensors") for p in (tmp_path / "p", finished[0]))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_torn_step_is_measured_again(tmp_path, finished, llama, tiny_tokenizer, monkeypatch):
    def stop(model, setup, ids):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "measure_prompt", stop)
        with pytest.raises(StopError):
            run(llama, tiny_tokenizer, RECIPE, tmp_path / "p", also=["recovery"])
    (tmp_path / "p" / "prompts" / "0000.recovery+losses.safetensors").write_bytes(b"torn")
    profile = run(llama, tiny_tokenizer, RECIPE, tmp_path / "p", also=["recovery"])
    assert profile == Profile.load(finished[0])


def snapshot(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_a_finished_profile_is_returned_and_never_damaged(finished, llama, tiny_tokenizer):
    out, _ = finished
    before = snapshot(out)
    assert run(llama, tiny_tokenizer, RECIPE, out) == Profile.load(out)
    other = RECIPE.model_copy(update={"keep": Keep(scorer="raw")})
    with pytest.raises(ProfileError, match=r"profile by other settings \(recipe differ\)"):
        run(llama, tiny_tokenizer, other, out)
    retrained = model_of("llama", hot=2.0)
    with pytest.raises(ProfileError, match=r"profile by other settings \(weights differ\)"):
        run(retrained, tiny_tokenizer, RECIPE, out)
    assert snapshot(out) == before


def test_foreign_directories_are_refused(tmp_path, llama, tiny_tokenizer):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ProfileError, match=r"not begun by this command \(thesis\.tex\)"):
        run(llama, tiny_tokenizer, RECIPE, tmp_path)
    assert snapshot(tmp_path) == {"thesis.tex": b"mine"}
    with pytest.raises(ProfileError, match="is a file; give a directory"):
        run(llama, tiny_tokenizer, RECIPE, tmp_path / "thesis.tex")


def test_prompts_longer_than_the_model_are_refused(tmp_path, llama, tiny_tokenizer):
    long = RECIPE.model_copy(update={"calibration": Calibration(prompts=1, tokens=1024)})
    with pytest.raises(CalibrationError, match="calibration.tokens is 1024, .* set it to 512"):
        run(llama, tiny_tokenizer, long, tmp_path / "p")


def test_an_infeasible_target_keeps_the_profile(tmp_path, llama, tiny_tokenizer):
    policy = BytesPolicy(kind="bytes", keep_ratio=0.01, context=256)
    recipe = RECIPE.model_copy(update={"policy": policy})
    with pytest.raises(PlanError, match="too few; the smallest plan needs"):
        run_and_plan(llama, tiny_tokenizer, recipe, tmp_path / "p")
    assert Profile.load(tmp_path / "p").recipe == recipe


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_neox", "opt", "gpt2"])
def test_every_family_is_profiled(tmp_path, tiny_tokenizer, family):
    recipe = Recipe(calibration=Calibration(prompts=1, tokens=192))
    plan = run_and_plan(model_of(family), tiny_tokenizer, recipe, tmp_path / "p")
    assert plan.predicted_loss is not None and plan.predicted_loss >= 0


def test_missing_and_damaged_profiles(tmp_path, finished):
    with pytest.raises(ProfileError, match="no profile there"):
        Profile.load(tmp_path)
    data = json.loads((finished[0] / "profile.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps(data | {"schema_version": 4}))
    with pytest.raises(ProfileError, match="schema_version"):
        Profile.load(tmp_path)
    (tmp_path / "profile.json").write_text(json.dumps(data | {"losses": data["losses"][:1]}))
    with pytest.raises(ProfileError, match="losses does not cover every layer"):
        Profile.load(tmp_path)
    with pytest.raises(ProfileError, match="no usable key constants"):
        Profile.load(finished[0]).load_params(tmp_path)


def test_the_report_counts_every_head(finished):
    plan = finished[1]
    facts = report.summary(plan, 256, 1)
    assert sum(facts["counts"].values()) == 4
    assert facts["kv_bytes"] <= 0.4 * facts["bf16_kv_bytes"]
    assert report.planned_size(RECIPE) == (256, 1)
    assert report.planned_size(Recipe()) == (1024, 1)
    shown = report.table(plan.model_copy(update={"weights": ("bf16", "nf4")}), 256, 1).renderables[
        1
    ]
    grid = shown.table
    assert list(grid.columns[-1].cells) == ["bf16", "nf4"] and grid.columns[-1].header == "weights"


def test_the_progress_counts_all_work_and_ends_with_the_saved_profile(
    llama, tiny_tokenizer, tmp_path
):
    told = []

    def tell(done, total):
        assert (done == total) == (tmp_path / "p" / "profile.json").is_file()
        told.append((done, total))

    recipe = Recipe(calibration=Calibration(prompts=2, tokens=128), keep=Keep(scorer="surrogate"))
    run(llama, tiny_tokenizer, recipe, tmp_path / "p", tell)
    total = told[-1][1]
    assert {each for _, each in told} == {total} and told[-1][0] == total
    steps = [0, *(done for done, _ in told)]
    # no kind of work is left to the end: only the saving itself comes after the last count
    jumps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert min(jumps) > 0 and jumps[-1] == 1 and max(jumps) == 3
