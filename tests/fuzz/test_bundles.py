"""A thousand mutants of bundles: each is refused in one line, or runs."""

from __future__ import annotations

import pytest

from tests.fuzz.run import run

MUTANTS = 1000


def test_mutants_of_bundles_are_refused_or_run(request: pytest.FixtureRequest) -> None:
    seed = int(request.config.option.hypothesis_seed)
    found = run("bundles", MUTANTS, seed)
    assert found.faults == [], found.words()
    assert found.tried == MUTANTS
    # most are caught, and not all: what is let in was run
    assert found.endings["refused"] > MUTANTS // 3 and found.endings["loaded"] > MUTANTS // 10
