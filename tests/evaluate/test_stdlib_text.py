"""Real text that Python carries: what calibrates a profile never stands in an evaluation."""

import hashlib

import pytest

from kvcompress.errors import KVCompressError
from kvcompress.tasks import stdlib_text
from kvcompress.tasks.stdlib_text import code, prose, split_of


def paragraphs(text):
    return {part.strip() for part in text.split("\n\n") if part.strip()}


def test_the_name_alone_decides():
    for name in ("for", "turtle", "argparse", "comparisons"):
        first = hashlib.sha256(name.encode()).hexdigest()[:2]
        expected = "evaluation" if int(first, 16) % 4 == 0 else "calibration"
        assert split_of(name) == expected
    assert split_of("turtle") == "evaluation" and split_of("argparse") == "calibration"


@pytest.mark.parametrize(("read", "least"), [(prose, 60_000), (code, 500_000)])
def test_splits_share_no_paragraph(read, least):
    ours, theirs = read("evaluation"), read("calibration")
    assert paragraphs(ours) & paragraphs(theirs) == set()
    assert len(ours) > least and len(theirs) > least
    assert len(paragraphs(ours)) == ours.count("\n\n") + 1  # each once


def test_text_stands_where_its_name_puts_it():
    assert "class TurtleScreen" in code("evaluation") and "class TurtleScreen" not in code(
        "calibration"
    )
    assert "class ArgumentParser" in code("calibration")
    assert "bitwise" in prose("evaluation").lower()


def test_a_python_without_sources_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(KVCompressError, match="no sources of its standard library"):
        code("evaluation")
