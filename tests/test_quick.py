"""`make quick` touches every part of the package."""

from pathlib import Path

import pytest

from tests.quick import QUICK

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "kvcompress"


def test_every_part_has_a_quick_test():
    parts = [path for path in PACKAGE.glob("*/") if any(path.glob("*.py"))]
    rooms = [path for path in (PACKAGE / "runtime").glob("*/") if any(path.glob("*.py"))]
    found = {path.relative_to(PACKAGE).as_posix() for path in (*parts, *rooms)}
    assert {*QUICK} == {*found, ""}


@pytest.mark.parametrize("part", QUICK)
def test_the_quick_tests_of_a_part_are_there_and_use_it(part):
    module = ".".join(["kvcompress", *filter(None, part.split("/"))])
    texts = []
    for name in QUICK[part]:
        file, _, test = name.partition("::")
        texts.append((TESTS / file).read_text(encoding="utf-8"))
        assert f"def {test}(" in texts[-1] if test else True, f"{name} is not there"
    assert any(module in text for text in texts), f"none of {QUICK[part]} uses {module}"
