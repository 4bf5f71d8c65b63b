"""What every command shares: options, where text goes and how a result is printed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, final

import typer
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table

from kvcompress.errors import KVCompressError
from kvcompress.strict import Json

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DEVICE_MAPS: Final = ("auto", "balanced", "balanced_low_0", "sequential")


def usable_device(value: str) -> str:
    """Refuse, before anything is read, a device that is not there.

    Raises:
        KVCompressError: for anything but ``auto`` and a CPU or CUDA device of this machine.
    """
    if value in ("auto", "cpu"):
        return value
    kind, _, number = value.partition(":")
    if kind != "cuda" or (":" in value and not number.isdecimal()):
        raise KVCompressError(f"--device {value}: give cpu, cuda, cuda:N or auto")
    import torch

    if not torch.cuda.is_available():
        why = "no device was found" if torch.version.cuda else "this build of torch has no CUDA"
        raise KVCompressError(f"--device {value}: {why}; give cpu, or leave it out")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise KVCompressError(f"--device {value}: the last of {count} devices is cuda:{count - 1}")
    return value


def chosen(device: str) -> str:
    """`device`, or the one that ``auto`` means."""
    import torch

    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def is_given(context: typer.Context, *names: str) -> list[str]:
    """Those of the options `names` that stand on the command line, as they are written."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            given.append(parameter.opts[-1] if parameter.opts else str(parameter.name))
    return given


def refuse_unread(context: typer.Context, where: str, *names: str) -> None:
    """Refuse options that were given and that the command does not read in this way of using it.

    Args:
        where: what makes it not read them, like ``with --render``.
    """
    given = is_given(context, *names)
    if given:
        raise typer.BadParameter(f"{', '.join(given)} does nothing {where}: leave it out")


def usable_map(value: str) -> str:
    """As `usable_device`, or a way in which transformers shares a model out over devices."""
    return value if value in DEVICE_MAPS else usable_device(value)


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:N, or auto: CUDA if there is one.", callback=usable_device
    ),
]
DtypeOption = Annotated[
    Literal["stored", "auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        help="What to compute in; auto: float32 where this machine multiplies 16 bits slower.",
    ),
]
MapOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:N, or auto, balanced or sequential: over all devices there are.",
        callback=usable_map,
    ),
]

PIPE_COLUMNS = 160  # a table that goes to a file or a pipe is not cut to 80 columns


@final
class _Console(Console):
    """Leaves it to the program what to do where nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling


def console() -> Console:
    """Console on stderr: progress and remarks, never results."""
    return _Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def stdout() -> Console:
    """Console on stdout: the result of a command."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return _Console(highlight=False, markup=False, width=width)


def emit(value: Json, json_: bool) -> None:
    """Print a command's result on stdout.

    Args:
        value: a mapping, a sequence of mappings (a table), a string, or a pydantic model or
            dataclass of these. Keys that end in ``_bytes`` hold whole bytes and are printed in
            KiB, MiB or GiB; JSON keeps them as they are.
        json_: one JSON document in place of tables.
    """
    if json_:
        print(json.dumps(plain(value), indent=2, allow_nan=False))
    elif hasattr(value, "__rich__") or hasattr(value, "__rich_console__"):
        stdout().print(fitting(value))
    else:
        _print(plain(value), stdout())


def fitting(value: RenderableType) -> RenderableType:
    """`value`, its tables as `Fitting`."""
    if isinstance(value, Table):
        return Fitting(value)
    return Group(*map(fitting, value.renderables)) if isinstance(value, Group) else value


@final
class Fitting:
    """A table, or line by line its headings and values where its columns would be cut off."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self.table
        wide = Measurement.get(console, options.update(max_width=10_000), table).maximum
        if wide <= options.max_width or not any(column.no_wrap for column in table.columns[1:]):
            yield table
            return
        if table.title:
            yield table.title
        first, *others = ([str(cell) for cell in column.cells] for column in table.columns)
        for number, name in enumerate(first):
            cells = [
                f"{column.header} {cells[number]}".strip()
                for column, cells in zip(table.columns[1:], others, strict=True)
                if cells[number]
            ]
            yield name
            yield Padding(", ".join(cells), (0, 0, 0, 4))
        if table.caption:
            yield table.caption


def plain(value: object) -> Json:
    """`value` in the types of JSON; a number that JSON lacks (NaN, infinity) becomes None."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    raise TypeError(f"cannot print a {type(value).__name__}: give mappings, lists, text or numbers")


def human_bytes(count_bytes: int) -> str:
    """``1536`` as ``1.50 KiB``; whole bytes below 1 KiB."""
    size, unit = float(count_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count_bytes} B" if unit == "B" else f"{size:.2f} {unit}"


def quiet_libraries() -> None:
    """Keep stderr for our own lines; best called before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.stderr.isatty():
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    if "transformers" in sys.modules:  # it has read the variables already
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _print(value: object, out: Console, title: str | None = None) -> None:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        out.print(_rows(value, title))
    elif isinstance(value, dict):
        simple = {key: item for key, item in value.items() if not _is_table(item)}
        if simple:
            out.print(_pairs(simple, title))
        for key, item in value.items():
            if _is_table(item):
                _print(item, out, key.replace("_", " "))
    else:
        out.print(_cell("", value), soft_wrap=True)


def _is_table(value: object) -> bool:
    return isinstance(value, dict | list) and bool(value) and not _is_flat_list(value)


def _is_flat_list(value: object) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _rows(rows: list[dict[str, object]], title: str | None) -> Table:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for key in keys:
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(_heading(key), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(key, row.get(key)) for key in keys))
    return table


def _pairs(pairs: dict[str, object], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for key, value in pairs.items():
        table.add_row(_heading(key), _cell(key, value))
    return table


def _heading(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        return json.dumps(value)
    return str(value)
