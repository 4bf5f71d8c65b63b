"""Rounds take turns, and what a window says is what its steps did."""

from __future__ import annotations

import time

import pytest

from kvcompress.measure.timing import Case, Window, case_of, interleave, stopwatch


def test_cases_take_turns_and_warm_rounds_are_not_recorded():
    calls: list[str] = []

    def case(name: str, wall_s: float) -> Case:
        def measure(steps: int) -> Window:
            calls.append(name)
            return Window(steps, wall_s * len(calls), wall_s, 6)

        return Case(name, measure)

    done: list[int] = []
    found = interleave([case("a", 1.0), case("b", 1.0)], 2, 3, done.append, warm_rounds=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert done == [1, 2, 3, 4, 5, 6]
    assert found["a"].wall_ms() == pytest.approx((1000.0, 5000 / 3))  # windows 3 and 5, 3 steps
    assert found["b"].wall_ms() == pytest.approx((4000 / 3, 2000.0))
    assert found["a"].cpu_ms() == pytest.approx((1000 / 3, 1000 / 3))
    assert found["a"].faults() == (2, 2)
    assert found["a"].steps == 6


def test_a_window_runs_its_own_untimed_step_and_prepares_before_it():
    calls: list[str] = []
    case = case_of("x", lambda: calls.append("step"), prepare=lambda: calls.append("prepare"))
    window = case.measure(2)
    assert calls == ["prepare", "step", "step", "step"]
    assert window.steps == 2
    calls.clear()
    case_of("x", lambda: calls.append("step"), warm=False).measure(2)
    assert calls == ["step", "step"]


def test_wall_and_processor_time_are_told_apart():
    asleep = stopwatch(lambda: time.sleep(0.05), 2)
    assert 0.1 <= asleep.wall_s < 1.0
    assert asleep.cpu_s < 0.05

    def busy() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    worked = stopwatch(busy, 2)
    assert 0.1 <= worked.cpu_s < 0.5
    assert worked.wall_s >= 0.9 * worked.cpu_s


def test_the_device_is_waited_for_before_both_readings():
    order: list[str] = []
    stopwatch(lambda: order.append("step"), 2, wait=lambda: order.append("wait"))
    assert order == ["wait", "step", "step", "wait"]


def test_nothing_to_time_is_refused():
    case = Case("a", lambda steps: Window(steps, 1.0, 1.0))
    with pytest.raises(ValueError, match="two cases share a name: a"):
        interleave([case, case], 1, 1)
    with pytest.raises(ValueError, match="1 cases, 0 rounds of 1 steps: nothing to time"):
        interleave([case], 0, 1)
