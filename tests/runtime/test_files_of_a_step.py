"""How many files a reader opens to follow a prompt or a decoded token: it only ever falls."""

from __future__ import annotations

from tools.files_of_a_step import COMPILED, PROMPT, PYTORCH, files_of, measured

# a way to code vectors is a file of its own, and key constants fit the prompt
MOST = {PROMPT: 35, PYTORCH: 25, COMPILED: 10}


def test_a_forward_runs_through_few_files():
    found = {kind: sorted(names) for kind, names in measured().items()}
    assert {PROMPT, PYTORCH} <= found.keys() <= MOST.keys()
    assert {kind: names for kind, names in found.items() if len(names) > MOST[kind]} == {}


def test_a_file_counts_once_one_of_its_functions_runs():
    from kvcompress.quant.codec import value_groups

    assert files_of(lambda: value_groups("int8", 64)) == {"quant/codec.py", "storage.py"}
    assert files_of(lambda: None) == set()
