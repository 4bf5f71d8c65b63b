"""A thousand mutants of saved caches: each is refused in one line, or decoded on."""

from __future__ import annotations

import pytest

from tests.fuzz.run import run

MUTANTS = 1000


def test_mutants_of_caches_are_refused_or_go_on(request: pytest.FixtureRequest) -> None:
    seed = int(request.config.option.hypothesis_seed)
    found = run("caches", MUTANTS, seed)
    assert found.faults == [], found.words()
    assert found.tried == MUTANTS
    # most are caught, and not all: what is let in was decoded on
    assert found.endings["refused"] > MUTANTS // 2 and found.endings["loaded"] > MUTANTS // 30
