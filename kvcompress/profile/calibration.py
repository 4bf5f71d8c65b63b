"""Calibration prompts: lists of token ids of one length, from the user's data or our own."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from kvcompress.errors import CalibrationError
from kvcompress.profile.builtin import builtin_prompts
from kvcompress.profile.tokens import opening_ids
from kvcompress.recipe import Calibration

BUILTIN: Final = "builtin"
_FILES: Final = (".txt", ".jsonl", ".parquet")


def load_prompts(calibration: Calibration, tokenizer: Any) -> list[list[int]]:
    """`calibration.prompts` lists of exactly `calibration.tokens` token ids.

    Each begins with what the tokenizer puts before a text, usually its BOS token.

    Raises:
        CalibrationError: if the data is missing, empty or too short, or lacks the text column.
    """
    if calibration.data == BUILTIN:
        return builtin_prompts(calibration, tokenizer)
    opening = opening_ids(tokenizer)
    fresh = calibration.tokens - len(opening)
    wanted = calibration.prompts * fresh
    ids: list[int] = []
    texts = 0
    for text in _texts(calibration):
        texts += 1
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    if not ids:
        raise CalibrationError(
            f"{calibration.data}: empty, no token in {texts} entries; give a file with some text"
        )
    if len(ids) < wanted:
        raise CalibrationError(
            f"{calibration.data}: {len(ids)} tokens found, {calibration.prompts} prompts of "
            f"{calibration.tokens} tokens need {wanted}; give more text, or set "
            f"calibration.prompts to {max(1, len(ids) // fresh)} or calibration.tokens lower"
        )
    pieces = [ids[i * fresh : (i + 1) * fresh] for i in range(calibration.prompts)]
    random.Random(calibration.seed).shuffle(pieces)
    return [opening + piece for piece in pieces]


def data_hash(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of the token ids: says whether two profiles saw the same data, and nothing of it."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()


def _texts(calibration: Calibration) -> Iterable[str]:
    path = Path(calibration.data)
    if path.suffix in _FILES:
        if not path.is_file():
            raise CalibrationError(
                f"{path}: no such file; give an existing {', '.join(_FILES)} file, the name of a "
                f"data set, or leave it out for the built-in prompts"
            )
        if path.suffix == ".txt":
            return [_read(path)]
        rows = _jsonl(path) if path.suffix == ".jsonl" else _parquet(path, calibration.text_column)
    elif path.exists():
        raise CalibrationError(f"{path}: give a file that ends in {', '.join(_FILES)}")
    else:
        rows = _data_set(calibration)
    return _column(rows, calibration)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path}: cannot read the text ({error}); it must be UTF-8"
        ) from None


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}: line {number} is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}: line {number} is not a JSON object with a text key")
        yield row


def _parquet(path: Path, column: str) -> Iterable[dict[str, Any]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            _unknown_column(str(path), column, names)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a readable parquet file ({error})") from None


def _data_set(calibration: Calibration) -> Iterable[dict[str, Any]]:
    import datasets

    name = calibration.data
    try:
        return iter(datasets.load_dataset(name, split=calibration.split, streaming=True))
    except Exception as error:  # the library raises its own, huggingface_hub's and the network's
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{name}: neither a file nor a data set with split {calibration.split!r} that can be "
            f"loaded ({reason}); check the name, or give a {', '.join(_FILES)} file"
        ) from None


def _column(rows: Iterable[dict[str, Any]], calibration: Calibration) -> Iterable[str]:
    column = calibration.text_column
    iterator = iter(rows)
    first = next(iterator, None)
    for row in chain([] if first is None else [first], iterator):
        if column not in row:
            _unknown_column(calibration.data, column, list(row))
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise CalibrationError(f"{calibration.data}: {column} holds {kind}, expected text")
        yield row[column]


def _unknown_column(where: str, column: str, names: Sequence[str]) -> None:
    raise CalibrationError(
        f"{where}: no column {column!r}; set calibration.text_column to one of {', '.join(names)}"
    )
