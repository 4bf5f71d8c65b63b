import pytest

from kvcompress.evaluate.suite import make_suite


def test_windows_are_held_out_text_behind_the_begin_token(tiny_tokenizer, text_file):
    suite = make_suite(
        tiny_tokenizer,
        tasks=[],
        context_tokens=100,
        windows=3,
        continuation_tokens=20,
        text=text_file,
    )
    text = text_file.read_text(encoding="utf-8")
    assert suite.samples == ()
    assert suite.windows.shape == (3, 120)
    assert suite.windows[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * 3
    pieces = [tiny_tokenizer.decode(row[1:]) for row in suite.windows]
    assert pieces[0] == text[:119]
    assert pieces[2] == text[-119:]
    assert pieces[1] in text


def test_a_text_too_short_for_one_window_is_refused(tiny_tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words", encoding="utf-8")
    with pytest.raises(ValueError, match=r"short.txt: 11 tokens of text, a window needs 163"):
        make_suite(tiny_tokenizer, tasks=[], context_tokens=100, text=short)
