"""`kvcompress inspect`, and its check alone under the name that it had, `kvcompress verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.common import JsonOption, MapOption, console, emit, refuse_unread
from kvcompress.cli.progress import progress
from kvcompress.cli.words import inspected, verified

if TYPE_CHECKING:
    from kvcompress.bundle.verify import VerifyReport


def command(
    given: typer.Context,
    path: Annotated[Path, typer.Argument(help="Bundle, profile directory or plan.json.")],
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per sequence; the plan's longest if not given."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check every file of a bundle, then run it."),
    ] = False,
    device: MapOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Show what each KV head keeps, in how many bits, and what that costs in bytes.

    With --verify a bundle is also run: plain and compressed logits must agree. Exits with 0 where
    the bundle is sound, else with 2. Examples:

        kvcompress inspect bundle --context 8192 --batch 4
        kvcompress inspect bundle --verify
    """
    from kvcompress.bundle.inspect import inspect
    from kvcompress.profile.report import glossary

    if not verify:
        refuse_unread(given, "without --verify", "device")
    report = _checked(path, device) if verify else None
    found = inspect(path, context, batch)
    if json_:
        emit(found if report is None else {"plan": found, "checks": report}, json_)
        return
    words = [f"{row.keeps} {row.storage}" for row in found.heads if row.head is not None]
    emit(inspected(found, [glossary(words, found.sink_tokens, found.recent_tokens)]), json_)
    if report is not None:
        _print(report, json_)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    device: MapOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """The check of `kvcompress inspect BUNDLE --verify` alone, under its former name.

    Exits with 0 where the bundle is sound, else with 2.

    Example: `kvcompress verify bundle`
    """
    _print(_checked(bundle, device), json_)


def _checked(bundle: Path, device: str) -> VerifyReport:
    from kvcompress.bundle.verify import verify

    with progress(f"checking {bundle}"):
        return verify(bundle, device_map=device)


def _print(report: VerifyReport, json_: bool) -> None:
    emit(report if json_ else verified(report), json_)
    console().print(f"{report.path}: sound, {report.files} files")
