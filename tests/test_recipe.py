"""Recipes: the shipped ones load, and a bad one is refused with all that is wrong with it."""

from pathlib import Path

import pytest
import yaml

from kvcompress.errors import RecipeError
from kvcompress.recipe import (
    BytesPolicy,
    Calibration,
    FastGenPolicy,
    Recipe,
    UniformPolicy,
    parse_bytes,
)
from kvcompress.registry import SUMS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
REQUIRED = {
    "fastgen",
    "fastgen-int4",
    "int8",
    "int4",
    "k8v4",
    "h2o",
    "streaming",
    "quarter",
    "eighth",
}


def test_a_mix_of_calibration_sources_is_checked():
    def mixed(text):
        return Recipe.from_yaml(f"calibration: {{{text}}}").calibration

    found = mixed("mix: {recall: 0.5, my.jsonl: 0.5}")
    assert found.sources() == {"recall": 0.5, "my.jsonl": 0.5}
    assert found.words() == "0.5 recall + 0.5 my.jsonl"
    assert Calibration(data="my.jsonl").sources() == {"my.jsonl": 1.0}
    assert Calibration(data="my.jsonl").words() == "my.jsonl"
    assert mixed("mix: {a.txt: 0.33, b.txt: 0.33, c.txt: 0.33}").mix is not None
    for text, message in [
        ("mix: {a.txt: 0.5, b.txt: 0.4}", r"calibration: mix: the shares add up to 0.9, not to 1"),
        ("mix: {}", "add up to 0, not to 1"),
        ("mix: {a.txt: 1.5}", r"calibration.mix.a.txt: Input should be less than or equal to 1"),
        ("data: a.txt, mix: {b.txt: 1.0}", "give data or mix, not both"),
        ("mix: {a.txt: 0.5, a.txt: 0.5}", "duplicate key"),
    ]:
        with pytest.raises(RecipeError, match=message):
            mixed(text)


def test_required_recipes_are_shipped():
    assert {path.stem for path in RECIPES} >= REQUIRED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_survives_its_own_yaml(path):
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_line_is_the_command_that_runs_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    model = "kvcompress/demo/model"
    assert first == f"# kvcompress profile {model} -r recipes/{path.name} -o runs/{path.stem}", (
        "a recipe starts with its command"
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_paper_names_its_source(path):
    text = path.read_text(encoding="utf-8")
    if "Differs from the paper" in text:
        assert "arXiv" in text


def test_settings_of_the_named_methods():
    loaded = {path.stem: Recipe.load(path) for path in RECIPES}
    fastgen, h2o = loaded["fastgen"].policy, loaded["h2o"]
    assert isinstance(fastgen, FastGenPolicy)
    assert (fastgen.recovery, fastgen.frequent_ratio, fastgen.local_ratio) == (0.95, 0.3, 0.3)
    assert isinstance(h2o.policy, UniformPolicy)
    assert h2o.keep.scorer == "raw"
    assert h2o.policy.head.frequent is not None and h2o.policy.head.local is not None
    assert (h2o.policy.head.frequent.ratio, h2o.policy.head.local.ratio) == (0.1, 0.1)
    for name, ratio in (("quarter", 0.25), ("eighth", 0.125)):
        policy = loaded[name].policy
        assert isinstance(policy, BytesPolicy)
        assert policy.keep_ratio == ratio


def test_unknown_keys_are_named_with_their_path():
    text = "polcy: {}\ncalibration: {prompt: 3}\npolicy: {kind: uniform, head: {sink: 1}}\n"
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "r.yaml")
    message = str(caught.value)
    for path in ("polcy", "calibration.prompt", "policy.uniform.head.sink"):
        assert f"{path}: unknown key" in message
    assert message.startswith("r.yaml: ")


def test_duplicate_key_is_refused_with_its_line():
    with pytest.raises(RecipeError, match=r"r\.yaml: name: duplicate key on line 3"):
        Recipe.from_yaml("name: a\nweights: bf16\nname: b\n", "r.yaml")


def test_nested_duplicate_key_is_refused():
    with pytest.raises(RecipeError, match="sink_tokens: duplicate key on line 3"):
        Recipe.from_yaml("keep:\n  sink_tokens: 4\n  sink_tokens: 5\n")


def test_every_problem_is_reported_at_once_on_one_line():
    text = (
        "name: Not A Name\n"
        "weights: int3\n"
        "calibration: {tokens: 8, prompts: 0}\n"
        "keep: {recent_tokens: 0}\n"
        "keep: {recent_tokens: -1}\n"
        "policy: {kind: fastgen, recovery: 1.5}\n"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    message = str(caught.value)
    for part in (
        "keep: duplicate key on line 5",
        "name: ",
        "weights: ",
        "calibration.tokens: ",
        "calibration.prompts: ",
        "keep.recent_tokens: ",
        "policy.fastgen.recovery: ",
        "(got 1.5)",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1\n", "not YAML"),
        ("schema_version: 2\n", "schema_version"),
        ("policy: {kind: magic}\n", "policy: .*'uniform', 'fastgen', .*'bytes'"),
        ("policy: {kind: bytes}\n", "give exactly one of keep_ratio and memory"),
        ("policy: {kind: bytes, keep_ratio: 0.5, memory: 8GiB}\n", "give exactly one of"),
        ("policy: {kind: bytes, memory: 8GB}\n", "'8GB' is not a size: write 8GiB"),
        ("policy: {kind: bytes, keep_ratio: 0.5, dtypes: []}\n", "dtypes is empty"),
        ("policy: {kind: uniform, head: {full: true, punct: true}}\n", "a full head keeps"),
        ("policy: {kind: uniform, head: {local: {}}}\n", "exactly one of tokens and ratio"),
        ("calibration: {prompts: 1e1}\n", "calibration.prompts: "),  # YAML reads 1e1 as text
    ],
)
def test_refused(text, reason):
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_yaml(text)


def test_a_missing_file_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match="none.yaml: cannot read the recipe"):
        Recipe.load(tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_a_recipe_error(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "r.yaml")


def test_yaml_tags_never_build_objects():
    with pytest.raises(RecipeError, match="the tag tag:yaml.org,2002:python/object"):
        Recipe.from_yaml("name: !!python/object/apply:os.getcwd []\n")


def test_the_resolved_recipe_writes_every_default_out():
    data = yaml.safe_load(Recipe().to_yaml())
    assert data["keep"] == {
        "sink_tokens": 4,
        "recent_tokens": 16,
        "scorer": "lift",
        "score_rows": 64,
        "score_stride": 32,
        "pool_tokens": 1,
        "per_request": None,
        "positions": "original",
        "turn_tokens": 0,
        "recall": None,
    }
    assert data["calibration"]["data"] == "builtin"


@pytest.mark.parametrize(
    ("text", "count_bytes"),
    [("8GiB", 8 * 2**30), ("512 MiB", 2**29), ("1.5KiB", 1536), ("7B", 7), ("2TiB", 2**41)],
)
def test_sizes(text, count_bytes):
    assert parse_bytes(text) == count_bytes


@pytest.mark.parametrize("text", ["8GB", "8", "GiB", "-1GiB", "8 gib", "1e3B", ""])
def test_sizes_that_are_refused(text):
    with pytest.raises(ValueError, match="is not a size: write 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_say_who_votes(path):
    """Their results were measured with it: no default of a later version may change it."""
    keep = yaml.safe_load(path.read_text(encoding="utf-8")).get("keep", {})
    assert keep.get("scorer", "lift") not in SUMS or "score_rows" in keep
    assert Recipe.load(path).keep.score_stride is None
