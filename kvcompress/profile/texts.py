"""Texts of a calibration file or data set, one entry at a time, each checked before it is used."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.errors import CalibrationError, KVCompressError
from kvcompress.recipe import Calibration
from kvcompress.runtime.model.chat import conversation_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES: Final = (".txt", ".jsonl", ".parquet")
CHAT_COLUMNS: Final = ("messages", "conversations")  # taken where there is no column of text
_DEFAULT_COLUMN: Final = Calibration().text_column
_SHUFFLED_ROWS: Final = 10_000  # buffer in which the rows of a streamed data set are mixed
_ROLES: Final = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}

Entry = Mapping[str, object]


def texts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Every text of ``calibration.data`` in its order; of a data set, in an order by the seed.

    Raises:
        CalibrationError: naming the file, the row and what is wrong with it.
    """
    path = Path(calibration.data)
    suffix = path.suffix.lower()
    if suffix in FILES:
        _check_file(path)
        if suffix == ".txt":
            return _checked(_lines(path))
        rows = _jsonl(path) if suffix == ".jsonl" else _parquet(path, calibration.text_column)
    elif path.exists():
        unpack = ", unpacked" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise CalibrationError(f"{path}: give a file that ends in {', '.join(FILES)}{unpack}")
    else:
        rows = _data_set(calibration)
    return _column(rows, calibration, tokenizer)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CalibrationError(f"{path}: is a directory; give one of the files in it")
    if not path.exists():
        raise CalibrationError(
            f"{path}: no such file; give an existing {', '.join(FILES)} file, the name of a "
            "data set, or leave it out for the built-in prompts"
        )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line with its line end) of a UTF-8 file; a byte-order mark is no part of it.

    Only a line feed ends a line: U+2028 and its like may stand inside of a JSON string.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}: line {number}"
                if b"\0" in line:
                    raise CalibrationError(f"{where} holds a NUL byte; it must be UTF-8 text")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield where, text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8; the file must be UTF-8 "
            "(iconv -f latin1 -t utf-8 converts Latin-1)"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot read it ({error.strerror})") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Entry]]:
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{where} is not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            raise CalibrationError(f"{where} is JSON that cannot be read ({error})") from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is not a JSON object with a text key")
        yield where, row


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Entry]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            tried = (column, *CHAT_COLUMNS) if column == _DEFAULT_COLUMN else (column,)
            usable = [name for name in tried if name in names]
            for batch in file.iter_batches(columns=usable[:1] or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{path}: not a readable parquet file ({reason})") from None


def _data_set(calibration: Calibration) -> Iterator[tuple[str, Entry]]:
    """Rows of a data set, streamed and mixed by the seed, as a large one cannot be read whole."""
    import datasets

    name = calibration.data
    place, _, config = name.partition(":")
    known = (place, config) if config else (place,)
    try:
        rows = datasets.load_dataset(*known, split=calibration.split, streaming=True)
        rows = rows.shuffle(seed=calibration.seed, buffer_size=_SHUFFLED_ROWS)
        for number, row in enumerate(rows, 1):
            yield f"{name}: row {number}", row
    except Exception as error:  # the library raises its own, huggingface_hub's and the network's
        if isinstance(error, CalibrationError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{name}: neither a file nor a data set with split {calibration.split!r} that can be "
            f"loaded ({reason}); check the name, or give a {', '.join(FILES)} file"
        ) from None


def _checked(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The texts, once it is sure that a tokenizer can take them. JSON can spell half of a surrogate
    pair, which no tokenizer takes."""
    for where, text in rows:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ord(text[error.start])
            raise CalibrationError(
                f"{where} holds \\u{half:04x}, half of a surrogate pair, which is no character"
            ) from None
        yield text


def _column(
    rows: Iterable[tuple[str, Entry]], calibration: Calibration, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """The text of each row: its text column, or a conversation as the chat template writes it."""

    def found() -> Iterator[tuple[str, str]]:
        column: str | None = None
        for where, row in rows:
            column = column or _chosen(where, row, calibration.text_column)
            if column not in row:
                raise CalibrationError(f"{where} has no {column!r}, as the rows before it have")
            yield where, _text(where, column, row[column], tokenizer)

    return _checked(found())


def _chosen(where: str, row: Entry, column: str) -> str:
    """The column to read, by the first row."""
    if column in row:
        return column
    if column == _DEFAULT_COLUMN:
        for name in CHAT_COLUMNS:
            if _messages(row.get(name)) is not None:
                return name
    usable = [name for name, value in row.items() if isinstance(value, str) or _messages(value)]
    hint = f"set calibration.text_column to one of {', '.join(usable)}"
    if not usable:
        hint = "none of its columns holds text or a conversation"
    there = ", ".join(row) or "none"
    raise CalibrationError(f"{where}: no column {column!r} (there: {there}); {hint}")


def _text(where: str, column: str, value: object, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value)
    if messages is None:
        kind = "null" if value is None else type(value).__name__
        raise CalibrationError(f"{where}: {column} holds {kind}, expected text or a conversation")
    try:
        return conversation_text(tokenizer, messages)
    except KVCompressError as error:
        raise CalibrationError(f"{where}: {column}: {error}") from None


def _messages(value: object) -> list[dict[str, str]] | None:
    """A conversation as role and content; None for anything else.

    OpenAI's form is {role, content}, ShareGPT's {from, value}; content may come in parts of text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    found = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
            content = "".join(map(str, parts)) if whole else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        found.append({"role": _ROLES.get(role, role), "content": content})
    return found


def streams(calibration: Calibration) -> bool:
    """Whether the texts are a data set's, in an order by the seed, of which a part will do."""
    return Path(calibration.data).suffix.lower() not in FILES


def spread(
    texts: Iterable[str],
    rng: random.Random,
    wanted: int,
    block_characters: int,
    first: bool = False,
) -> tuple[list[list[str]], bool]:
    """`wanted` blocks of consecutive text, each block of the source as likely as any other.

    Args:
        block_characters: about the length of a block; short texts are put together and long ones
            are cut at white space.
        first: take the first ones and read no further.

    Returns:
        The blocks in the order of the texts, and whether they are all that there are.
    """
    kept: list[tuple[int, list[str]]] = []
    number = -1
    for number, block in enumerate(_blocks(texts, block_characters)):
        if number < wanted:
            kept.append((number, block))
        elif first:
            break
        elif (place := rng.randrange(number + 1)) < wanted:  # reservoir sampling, algorithm R
            kept[place] = (number, block)
    return [block for _, block in sorted(kept)], number < wanted


def _blocks(rows: Iterable[str], size: int) -> Iterator[list[str]]:
    block: list[str] = []
    room = size
    for text in rows:
        while len(text) > room:
            cut = _cut(text, room)
            yield [*block, text[:cut]]
            text, block, room = text[cut:], [], size
        if text:
            block.append(text)
            room -= len(text)
    if block:
        yield block


def _cut(text: str, room: int) -> int:
    """Where to end a block: before the last white space that fits, or else where it is full."""
    space = max(text.rfind(" ", 1, room), text.rfind("\n", 1, room))
    return space if space > 0 else room
