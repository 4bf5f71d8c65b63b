"""Calibration prompts from every kind of source, and what is said when there are none."""

import json
import random

import pytest
from transformers import AutoTokenizer

from kvcompress.errors import CalibrationError
from kvcompress.profile.builtin.real_text import calibration_text
from kvcompress.profile.calibration import asked_for, data_hash, load_prompts, read_prompts
from kvcompress.profile.collect import held_out_rows
from kvcompress.recipe import Calibration
from kvcompress.tokenizer import opening_ids, punct_ids, special_ids

TEXTS = [f"Line {i} of the calibration text.\n" for i in range(100)]


def load(tokenizer, data, **settings):
    settings = {"prompts": 2, "tokens": 64} | settings
    return load_prompts(Calibration(data=str(data), **settings), tokenizer)


def test_notes_end_in_answered_questions(tiny_tokenizer):
    prompts = load(tiny_tokenizer, "notes", prompts=8, tokens=1024)
    assert {len(p) for p in prompts} == {1024} and {p[0] for p in prompts} == {0}
    texts = [tiny_tokenizer.decode(p[1:]) for p in prompts]
    for number, text in enumerate(texts):
        held_out = tiny_tokenizer.decode(prompts[number][-held_out_rows(1024) :])
        if number % 4 == 3:
            assert "Ask: " not in text
            continue
        assert "Ask: " in held_out
        before = tiny_tokenizer.decode(prompts[number][: -held_out_rows(1024)])
        # hidden but in one of three: at most the first question begins before the rows
        assert before.count("Ask:") >= 2 if number % 4 == 1 else before.count("Ask:") <= 1
        document, _, questions = text.partition("Ask: ")
        for line in f"Ask: {questions}".splitlines()[:-1]:
            assert line.replace("Ask:", "Note:") in document


def test_prompts_follow_the_seed(tiny_tokenizer):
    first, again, other = (
        data_hash(load(tiny_tokenizer, "builtin", tokens=512, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_demo_model_names_notes_and_has_those_it_always_had(demo_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    builtin, notes = load(tokenizer, "builtin", tokens=512), load(tokenizer, "notes", tokens=512)
    assert builtin == notes
    # as made before there were others, so that profiles of this model stay comparable
    assert data_hash(load(tokenizer, "builtin", prompts=16, tokens=1024)) == (
        "1b781aa0d882e655afc430e9175c9a15b69287684de6687b3da84cce4687eb86"
    )
    kinds = [
        [p.kind for p in read_prompts(Calibration(data=data, prompts=8, tokens=256), tokenizer)]
        for data in ("builtin", "recall")
    ]
    assert kinds == [["notes", "notes", "notes", "text"] * 2, ["notes"] * 8]


def test_a_tokenizer_that_names_unknown_prompts_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(tiny_tokenizer.init_kwargs, "kvcompress_calibration", "poems")
    with pytest.raises(CalibrationError, match="is 'poems'; this version knows 'notes'"):
        load(tiny_tokenizer, "builtin")


@pytest.mark.parametrize(
    ("mix", "prompts", "order"),
    [
        ({"notes": 0.5, "FILE": 0.5}, 4, "nono"),
        ({"FILE": 0.75, "notes": 0.25}, 8, "oonooono"),
        ({"FILE": 1.0}, 3, "ooo"),
        ({"notes": 0.99, "FILE": 0.01}, 4, "nnon"),
        ({"notes": 0.33, "FILE": 0.33, "recall": 0.33}, 3, "not"),
    ],
)
def test_a_mix_shares_out_the_prompts_and_alternates(tiny_tokenizer, tmp_path, mix, prompts, order):
    path = str(write(tmp_path / "data.txt", TEXTS))
    mix = {source.replace("FILE", path): share for source, share in mix.items()}
    settings = {"prompts": prompts, "tokens": 192}  # bytes: too short for recall, which is text
    found = read_prompts(Calibration(mix=mix, **settings), tiny_tokenizer)
    assert [prompt.kind[0] for prompt in found] == list(order)
    assert {len(prompt.ids) for prompt in found} == {192}
    notes = [prompt.ids for prompt in found if prompt.kind == "notes"]
    assert notes == load(tiny_tokenizer, "notes", **settings)[: len(notes)]


def test_a_mix_of_more_sources_than_prompts_is_refused(tiny_tokenizer):
    with pytest.raises(CalibrationError, match="calibration.prompts is 1, calibration.mix has 2"):
        load_prompts(Calibration(mix={"notes": 0.5, "x.txt": 0.5}, prompts=1), tiny_tokenizer)


def test_too_little_text_of_ones_own_in_a_mix_says_how_many_prompts_it_gives(
    tiny_tokenizer, tmp_path
):
    (tmp_path / "short.txt").write_text("x" * 600)  # three prompts of 191
    calibration = Calibration(mix={"notes": 0.5, str(tmp_path / "short.txt"): 0.5}, tokens=192)
    with pytest.raises(CalibrationError, match="8 prompts of 192 .* set calibration.prompts to 6"):
        load_prompts(calibration, tiny_tokenizer)


def test_what_a_command_line_says_of_sources():
    was = Calibration(data="old.txt", prompts=4)

    def sources(data=None, mix=()):
        found = asked_for(was, data, mix)
        assert found.prompts == 4
        return found.sources()

    assert sources() == {"old.txt": 1}
    assert sources("new.txt") == {"recall": 0.5, "new.txt": 0.5}
    assert sources("notes") == {"notes": 1}
    assert sources(mix=["builtin=0.25", "a=b.jsonl=0.75"]) == {"builtin": 0.25, "a=b.jsonl": 0.75}
    assert sources(mix=["new.txt=1"]) == {"new.txt": 1}
    for mix, message in [
        (["new.txt"], "write SOURCE=SHARE"),
        (["new.txt=half"], "write SOURCE=SHARE"),
        (["new.txt=0.5"], "add up to 0.5, not to 1"),
        (["=1"], "a source has no name"),
        (["new.txt=nan"], "a finite number"),
    ]:
        with pytest.raises(
            ValueError if "write" not in message else CalibrationError, match=message
        ):
            sources(mix=mix)
    with pytest.raises(CalibrationError, match="give --data or --mix, not both"):
        sources("new.txt", ["new.txt=1"])


def test_calibration_text_is_not_the_held_out_text(demo_model_dir):
    held_out = (demo_model_dir / "held_out.txt").read_text().splitlines()
    lines = {line.strip() for line in held_out if len(line.strip()) > 30}
    assert not any(line.strip() in lines for line in calibration_text().splitlines())


def write(path, texts, column="text"):
    if path.suffix == ".txt":
        path.write_text("".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files_give_pieces_of_their_text_that_do_not_overlap(tiny_tokenizer, tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", TEXTS)
    prompts = load(tiny_tokenizer, path, prompts=30)
    assert [len(p) for p in prompts] == [64] * 30
    whole = "".join(TEXTS)
    starts = sorted(whole.index(tiny_tokenizer.decode(p[1:])) for p in prompts)
    assert {(start - starts[0]) % 63 for start in starts} == {0} and len({*starts}) == 30


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("count", [100, 3000])
def test_the_seed_chooses_prompts_from_the_whole_file(tiny_tokenizer, tmp_path, suffix, count):
    lines = [f"Line {i:05d} of the calibration text.\n" for i in range(count)]
    path = write(tmp_path / f"data{suffix}", lines)

    def places(seed):
        prompts = load(tiny_tokenizer, path, tokens=72, prompts=3, seed=seed)
        texts = [tiny_tokenizer.decode(p[1:]) for p in prompts]
        return [int(text.split("Line ")[1][:5]) / count for text in texts]

    assert places(5) == places(5) != places(6)
    drawn = [place for seed in range(40) for place in places(seed)]
    # each tenth of the file holds 12 of 120 on average; 1 or fewer is a chance of 1 in 20 000
    tenths = [sum(int(10 * place) == tenth for place in drawn) for tenth in range(10)]
    assert min(tenths) >= 2, tenths
    assert max(drawn) > 0.95


class Stream:
    """As `datasets.IterableDataset`: mixed by a seed, and far too long to be read whole."""

    def __init__(self, read, texts):
        self.read, self.texts = read, texts

    def shuffle(self, seed, buffer_size):
        assert buffer_size > 1
        return Stream(self.read, random.Random(seed).sample(self.texts, len(self.texts)))

    def __iter__(self):
        while True:
            for text in self.texts:
                self.read.append(text)
                yield {"body": text}


def test_a_data_set_is_read_by_its_name_as_far_as_needed(tiny_tokenizer, monkeypatch):
    import datasets

    asked, read = {}, []

    def load_dataset(name, **settings):
        asked.update(settings, name=name)
        return Stream(read, TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"text_column": "body", "split": "validation"}
    prompts = load(tiny_tokenizer, "some/set", **settings)
    assert len(prompts) == 2
    assert asked == {"name": "some/set", "split": "validation", "streaming": True}
    assert sum(map(len, read)) < 2 * 64 * 64
    assert prompts != load(tiny_tokenizer, "some/set", seed=1, **settings)


def test_a_data_set_may_have_a_configuration(tiny_tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split, streaming):
        asked.append(names)
        return Stream([], TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load(tiny_tokenizer, "some/set:small", text_column="body")
    assert asked == [("some/set", "small")]


def test_a_data_set_that_cannot_be_loaded(tiny_tokenizer, monkeypatch):
    import datasets

    def load_dataset(name, **settings):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"some/set: neither a file nor a data set .*\(no network at all\)"
    with pytest.raises(CalibrationError, match=message):
        load(tiny_tokenizer, "some/set")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_unknown_column_names_those_that_exist(tiny_tokenizer, tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", TEXTS, column="body")
    with pytest.raises(
        CalibrationError, match=r"no column 'text' \(there: body\); set .* to one of body"
    ):
        load(tiny_tokenizer, path)


def test_data_that_is_missing_empty_or_too_short(tiny_tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match=r"gone\.txt: no such file"):
        load(tiny_tokenizer, tmp_path / "gone.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CalibrationError, match=r"empty\.txt: empty"):
        load(tiny_tokenizer, tmp_path / "empty.txt")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(CalibrationError, match=r"empty\.jsonl: empty"):
        load(tiny_tokenizer, tmp_path / "empty.jsonl")
    (tmp_path / "short.txt").write_text("x" * 100)
    message = "100 tokens found, 2 prompts of 64 tokens need 126; .* calibration.prompts to 1"
    with pytest.raises(CalibrationError, match=message):
        load(tiny_tokenizer, tmp_path / "short.txt")


def test_files_that_cannot_be_read(tiny_tokenizer, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match="must be UTF-8"):
        load(tiny_tokenizer, tmp_path / "bytes.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(CalibrationError, match="line 2 is not JSON"):
        load(tiny_tokenizer, tmp_path / "bad.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(CalibrationError, match="line 1: text holds int, expected text"):
        load(tiny_tokenizer, tmp_path / "numbers.jsonl")
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        load(tiny_tokenizer, tmp_path / "bad.parquet")
    (tmp_path / "data.csv").touch()
    with pytest.raises(CalibrationError, match="give a file that ends in"):
        load(tiny_tokenizer, tmp_path / "data.csv")


def test_token_classes(tiny_tokenizer):
    assert special_ids(tiny_tokenizer) == (0, 1, 2)
    texts = {tiny_tokenizer.decode([i]) for i in punct_ids(tiny_tokenizer)}
    assert texts == set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    assert opening_ids(tiny_tokenizer) == [0]
