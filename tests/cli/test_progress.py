"""Lines about long work, by a clock that the test moves."""

import io
import threading

import pytest
from rich.console import Console

from kvcompress.cli import progress
from kvcompress.cli.progress import EVERY_SECONDS, Lines, words


class Clock:
    """Stands still but for `wait`, during which work is done."""

    def __init__(self, work, seconds):
        self.now, self.work, self.until = 0.0, work, seconds

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """As `threading.Event.wait`: True once the work is done."""
        for _ in range(round(10 * seconds)):
            self.now = round(self.now + 0.1, 1)
            self.work(self.now)
            if self.now >= self.until:
                return True
        return False


def told(work, seconds, total):
    """(time, line) of everything that is said while `work` goes on."""
    said = []
    clock = Clock(lambda now: work(now, lines), seconds)
    lines = Lines("profiling m", total, lambda text: said.append((clock.now, text)), clock)
    lines.tell(clock.wait)
    return said


@pytest.mark.parametrize("seconds", [10, 29, 100, 4000])
def test_no_half_minute_passes_without_a_line(seconds):
    said = told(lambda now, lines: lines(int(now / seconds * 80)), seconds, 80)
    times = [0.0, *(time for time, _ in said), float(seconds)]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) <= 30.05
    assert all(text.startswith("profiling m: ") and "\n" not in text for _, text in said)


def test_a_line_says_how_far_it_is_and_how_long_it_takes():
    said = told(lambda now, lines: lines(int(now / 10)), 400, 40)
    assert said[0][1] == "profiling m: 2 of 40 (5 %), 25 s so far, about 6 min 15 s left"
    assert said[7][1] == "profiling m: 20 of 40 (50 %), 3 min 20 s so far, about 3 min 20 s left"


def test_the_first_line_promises_nothing_before_a_step_is_done():
    said = told(lambda now, lines: None, 60, 40)
    assert said[0][1] == "profiling m: 0 of 40 (0 %), 25 s so far"


def test_a_stuck_step_is_not_promised_to_have_ended_long_ago():
    said = told(lambda now, lines: lines(2) if now < 20 else None, 200, 3)
    assert said[-1][1] == "profiling m: 2 of 3 (66 %), 2 min 55 s so far"


def test_work_without_an_end_in_sight_shows_what_it_does():
    said = told(lambda now, lines: None, 60, 1)
    assert [text for _, text in said] == ["profiling m: 25 s so far", "profiling m: 50 s so far"]
    notes = []
    lines = Lines("exporting", 1, notes.append, lambda: 0.0)
    lines.note("checking the bundle")
    assert notes == ["checking the bundle"]
    assert lines.line() == "exporting: checking the bundle: 0 s so far"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7300, "2 h 1 min")],
)
def test_seconds_in_words(seconds, text):
    assert words(seconds) == text


def test_lines_go_to_stderr_and_stop_with_the_work(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    before = threading.active_count()
    with progress.progress("probing [m]", 3) as step:
        step(1)
        wait = threading.Event()
        wait.wait(0.2)
    assert threading.active_count() == before
    out, err = capsys.readouterr()
    assert out == ""
    lines = set(err.splitlines())
    assert lines and all(
        text.startswith("probing [m]: 1 of 3 (33 %), 0 s so far") for text in lines
    )


def test_short_work_says_nothing(capsys):
    with progress.progress("prompts", 2) as step:
        step(1)
    assert capsys.readouterr() == ("", "")
    assert EVERY_SECONDS < 30


@pytest.mark.parametrize("total", [1, 40])
def test_a_terminal_gets_a_bar(monkeypatch, total):
    screen = Console(
        file=io.StringIO(), force_terminal=True, width=120, markup=False, highlight=False
    )
    monkeypatch.setattr(progress, "console", lambda: screen)
    with progress.progress("measuring", total) as step:
        step.note("a remark [x]")
        step(20)
    shown = screen.file.getvalue()
    assert "a remark [x]\n" in shown and "measuring: a remark" in shown
    assert ("20/40" in shown) == (total == 40)
