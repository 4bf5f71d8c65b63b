"""CONTRIBUTING's example of a scorer is complete: one file and one registry line make it run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import kvcompress
from kvcompress.errors import RecipeError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan
from kvcompress.recipe import Recipe, UniformPolicy
from kvcompress.registry import SCORERS
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.evict import test_scorers

ROOT = Path(__file__).parents[1]
NAME, FOLDER = "value_norm", "contributed_scorers"
TOKENS, SINKS, RECENT = 60, 4, 16


def block(language: str) -> str:
    """The one fenced block of a language in the section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Add a scorer\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def contributed(tmp_path, monkeypatch):
    """The example's file in a package of its own, and its line in the registry."""
    source = block("python")
    first = source.splitlines()[0]
    assert first == f"# kvcompress/evict/scorers/{NAME}.py"
    package = tmp_path / FOLDER
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"{NAME}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    line = eval("{" + block("text") + "}", {"_HERE": FOLDER})
    assert list(line) == [NAME]
    monkeypatch.setitem(SCORERS, NAME, line[NAME])
    yield scorer(NAME)
    for module in [name for name in sys.modules if name.split(".")[0] == FOLDER]:
        del sys.modules[module]


def test_the_recipe_is_refused_before_the_line_is_added():
    with pytest.raises(RecipeError, match=f"unknown scorer '{NAME}'"):
        Recipe.from_yaml(block("yaml"))


def test_the_suite_over_the_registry_takes_it(contributed):
    assert contributed.name == NAME
    test_scorers.test_registry(NAME)


def plan_of(recipe: Recipe, model) -> Plan:
    """The recipe's uniform policy, as `kvcompress profile` solves it."""
    shape = shape_of(model.config, model.dtype)
    assert isinstance(recipe.policy, UniformPolicy)
    return Plan(
        model=shape,
        heads=((recipe.policy.head,) * shape.kv_heads,) * shape.layers,
        max_position=shape.max_position,
        **recipe.keep.model_dump(),
    )


def kept_tokens(layer) -> list[set[int]]:
    """Per KV head the coded tokens of the only row."""
    found: list[set[int]] = [set() for _ in layer.state.settings.heads]
    for group in layer.state.groups:
        for index, head in enumerate(group.heads):
            start, size = group.store.starts[0][index], group.store.capacities[0][index]
            held = group.store.position[start : start + size].tolist()
            found[head] = {p for p in held if p >= 0}
    return found


def test_a_model_keeps_the_longest_values(contributed, tiny_llama):
    recipe = Recipe.from_yaml(block("yaml"))
    ids = torch.randperm(240, generator=torch.Generator().manual_seed(0))[None, :TOKENS] + 3
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out[0]))
        for layer in tiny_llama.model.layers
    ]
    kvcompress.attach(tiny_llama, plan_of(recipe, tiny_llama))
    try:
        cache = kvcompress.new_cache(tiny_llama)
        with torch.no_grad():
            tiny_llama(ids, **as_argument(cache), use_cache=True)
        for layer, value in zip(cache.compressed_layers, values, strict=True):
            norms = value.double().unflatten(-1, (2, -1)).norm(dim=-1)[SINKS : TOKENS - RECENT]
            best = norms.topk(12, dim=0).indices.T + SINKS
            assert kept_tokens(layer) == [set(row.tolist()) for row in best]
        new = tiny_llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    finally:
        kvcompress.detach(tiny_llama)
        for hook in hooks:
            hook.remove()
    assert new.shape[1] > TOKENS
