"""Every number in every file of ours has bounds, found by walking over the schemas."""

import json
import math
import typing
from types import UnionType

import pytest
from pydantic import BaseModel, ValidationError

from kvcompress.bench.result import Result
from kvcompress.bundle.manifest import Manifest
from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, StrictModel, uniform
from kvcompress.profile.store import Profile
from kvcompress.recipe import Recipe

ROOTS = (Recipe, Plan, Profile, Manifest, Result)


def models(roots: tuple[type[BaseModel], ...]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []

    def visit(kind: object) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind not in found:
                found.append(kind)
                for field in kind.model_fields.values():
                    visit(field.annotation)
        for part in typing.get_args(kind):
            visit(part)

    for root in roots:
        visit(root)
    return found


def numbers(kind: object) -> set[type]:
    """int and float anywhere inside of an annotation."""
    if kind in (int, float):
        return {kind}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return set()
    return set().union(*map(numbers, typing.get_args(kind)), set())


FIELDS = [
    (model, name)
    for model in models(ROOTS)
    for name, field in model.model_fields.items()
    if numbers(field.annotation)
]


def test_the_walk_finds_every_schema():
    found = {model.__name__ for model in models(ROOTS)}
    assert {"Recipe", "Keep", "Budget", "HeadPlan", "Recall", "ModelShape", "Provenance",
            "FileEntry", "BytesPolicy"} <= found  # fmt: skip
    assert all(issubclass(model, StrictModel) for model in models(ROOTS))
    assert len(FIELDS) > 60


def wrapped(kind: object, value: object) -> list[object]:
    """The value as the annotation holds it: alone, or in tuples and dicts."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):
        return [value]
    if origin is tuple:
        inner = [item for part in parts if part is not ... for item in wrapped(part, value)]
        count = 1 if ... in parts else len(parts)
        return [(item,) * count for item in inner]
    if origin is dict:
        keys = typing.get_args(parts[0]) or ("a",)
        return [{keys[0]: item} for item in wrapped(parts[1], value)]
    if origin is typing.Annotated:
        return wrapped(parts[0], value)
    if origin in (typing.Union, UnionType):
        return [item for part in parts for item in wrapped(part, value)]
    return []


ABSURD = ["2**31", "2**63", "10**30", "-(2**31)", "nan", "inf", "True", "text"]
VALUES = {"nan": math.nan, "inf": math.inf, "True": True, "text": "3"}


@pytest.mark.parametrize("absurd", ABSURD)
@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_an_absurd_number_is_refused(model, name, absurd):
    field = model.model_fields[name]
    kinds = numbers(field.annotation)
    value = VALUES[absurd] if absurd in VALUES else eval(absurd)
    large = isinstance(value, int) and not isinstance(value, bool)
    if large and float in kinds:
        pytest.skip("a float may be large")
    if absurd == "2**31" and ("bytes" in name or name == "faults"):
        pytest.skip("a number of bytes may be large")
    for item in wrapped(field.annotation, value):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: item}, strict=True)
        wrong = [error["loc"][0] for error in caught.value.errors()]
        assert name in wrong, f"{model.__name__}.{name} takes {absurd}"


SHAPE = ModelShape(
    model_type="x", config_hash="x", layers=1, query_heads=2, kv_heads=1, head_dim=8,
    sliding_windows=(None,), max_position=64,
)  # fmt: skip


def test_a_plan_that_python_would_take_and_json_says_twice_is_refused():
    text = uniform(SHAPE, HeadPlan(local=Budget(tokens=3))).to_json()
    assert Plan.from_json(text).heads[0][0].local.tokens == 3
    for old, new, match in (
        ('"tokens": 3', '"tokens": 3, "tokens": 5', "the key 'tokens' stands twice"),
        ('"predicted_loss": null', '"predicted_loss": NaN', "NaN is no JSON number"),
        ('"predicted_loss": null', '"predicted_loss": 1e999', "larger than any number"),
        ('"target": "by hand"', '"target": ' + "[" * 99, "nested more than 64 levels"),
        ('"punct_ids": []', f'"punct_ids": {json.dumps([1] * (2**20 + 1))}', "punct_ids"),
    ):
        changed = text.replace(old, new, 1)
        assert changed != text
        with pytest.raises(KVCompressError, match=match):
            Plan.from_json(changed)
