"""Every file that a command reads, in every state it can be in: one line and exit code 2."""

import random

import pytest

from kvcompress.cli import app

BYTES = {
    "missing": None,
    "a folder": "folder",
    "empty": b"",
    "noise": random.Random(0).randbytes(3000),
    "Latin-1": "name: caf\xe9\n".encode("latin-1"),
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "NUL": b"\0" * 100,
    "a JSON list": b"[1, 2]",
    "null": b"null",
    "a number": b"17",
    "an empty object": b"{}",
    "cut": b'{"schema_version": 1, "model": {',
    "deep": b"[" * 20_000,
    "wrong types": b'{"schema_version": 1, "model": 3, "heads": "x", "name": [], "conditions": 1}',
}
# states in which a file may be what is asked for, by the end of what reads it
GOOD = {
    "-r X": ("an empty object",),  # a recipe of defaults
    "-d X ": ("deep",),  # some text
    "X --workloads hidden": (
        *("empty", "a JSON list", "null", "a number"),
        *("an empty object", "cut", "deep", "wrong types"),
    ),
    "64": ("deep",),
}
# where the file stands on the command line: X, in the name that the command expects
READ = {
    "profile MODEL -o OUT -r X": ".yaml",
    "profile MODEL -o OUT -d X": ".jsonl",
    "profile MODEL -o OUT -d X ": ".txt",
    "profile MODEL -o OUT -d X  ": ".parquet",
    "profile X -o OUT": "",
    "plan X -o OUT": "",
    "plan PROFILE -o OUT -r X": ".yaml",
    "export X -o OUT": "",
    "export PROFILE -o OUT -r X": ".yaml",
    "export PROFILE -o OUT --plan X": ".json",
    "export PROFILE -o OUT --model X": "",
    "inspect X": ".json",
    "verify X": "",
    "generate X -p text": "",
    "chat X": "",
    "inspect X --verify": "",
    "doctor X": ".json",
    "doctor X ": "",
    "probe X": "",
    "eval X": "",
    "eval MODEL --plan X": ".json",
    "eval MODEL --text X --tasks , --windows 1 --context 64": ".txt",
    "eval MODEL --text X --workloads hidden": ".txt",
    "bench X": "",
    "bench MODEL --plan X": ".json",
    "league X -o OUT": "",
    "league MODEL -o OUT --recipes X": "",
    "league MODEL -o OUT --recipes RECIPES --profile X --workloads hidden": "",
    "league --render X": ".json",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model_dir):
    """A model, a profile of it and a folder of recipes, all good."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "recipes").mkdir()
    recipe = folder / "recipes" / "small.yaml"
    recipe.write_text(
        "name: small\ncalibration: {prompts: 1, tokens: 64}\npolicy: {kind: fastgen}\n"
    )
    with pytest.raises(SystemExit) as end:
        app.main(["profile", str(tiny_model_dir), "-r", str(recipe), "-o", str(folder / "p")])
    assert end.value.code == 0
    return {"MODEL": tiny_model_dir, "PROFILE": folder / "p", "RECIPES": folder / "recipes"}


@pytest.mark.parametrize("where", READ)
def test_a_file_in_any_state_is_one_line(capfd, tmp_path, places, where):
    wrong = []
    good = next((kinds for end, kinds in GOOD.items() if where.endswith(end)), ())
    for kind, content in BYTES.items():
        if kind in good and "X" in where:
            continue
        path = tmp_path / f"{kind.replace(' ', '-')}{READ[where]}"
        if content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        words = {**places, "X": path, "OUT": tmp_path / "out"}
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            app.main([str(words.get(word, word)) for word in where.split()])
        out, err = capfd.readouterr()
        one_line = err.startswith("error: ") and err.count("\n") == 1 and out == ""
        if end.value.code != 2 or not one_line or path.name not in err:
            wrong.append((kind, end.value.code, out[-300:], err[-600:]))
    assert not wrong, "\n".join(map(str, wrong))


WRITTEN = (
    "profile MODEL -r RECIPE -o X",
    "plan PROFILE -o X",
    "export PROFILE -o X",
    "demo --quick -o X",
    "league MODEL --recipes RECIPES -o X",
)


@pytest.mark.parametrize("where", WRITTEN)
def test_a_place_that_cannot_be_written_is_one_line(capfd, tmp_path, places, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    bad = {"below a file": tmp_path / "file" / "x", "no name at all": "x" * 300}
    one_file = where.startswith("plan")
    bad |= {"a folder": tmp_path / "full"} if one_file else {"a file": tmp_path / "file"}
    recipe = places["RECIPES"] / "small.yaml"
    for kind, path in bad.items():
        words = {**places, "X": path, "RECIPE": recipe}
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            app.main([str(words.get(word, word)) for word in where.split()])
        out, err = capfd.readouterr()
        line = err.splitlines()[-1]
        assert (end.value.code, out) == (2, ""), (kind, err)
        assert line.startswith("error: ") and str(path)[:40] in line, (kind, err)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
