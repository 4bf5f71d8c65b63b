"""The `kvcompress` program: registers the commands and turns a user's errors into one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Final, NoReturn

import typer

from kvcompress import __version__
from kvcompress.cli import (
    bench,
    chat,
    demo,
    doctor,
    ending,
    export,
    generate,
    inspect,
    league,
    plan,
    profile,
)
from kvcompress.cli import eval as evaluate
from kvcompress.cli.common import quiet_libraries

COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "demo": demo.command,
    "profile": profile.command,
    "plan": plan.command,
    "export": export.command,
    "inspect": inspect.command,
    "eval": evaluate.command,
    "generate": generate.command,
    "chat": chat.command,
    "league": league.command,
    "doctor": doctor.command,
    "bench": bench.command,
    "probe": doctor.probe,
    "verify": inspect.verify,
}
HIDDEN: Final = ("probe", "verify")  # parts of doctor and inspect, for scripts that call them
GO_ON: Final = {
    "profile": "finished prompts are kept: run the same command again to go on",
    "league": "finished cells are kept: run the same command again to go on",
    "export": "nothing half-made is left: run the same command again",
}


def build() -> typer.Typer:
    """The program with its commands; nothing heavy is imported until a command runs."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        app.command(name, hidden=name in HIDDEN)(ending.guarded(command))
    return app


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command.

    Exits with 0; with 2 and one line on stderr for an error that the user can mend; with 70 and
    one line for a bug of ours, whose traceback ``--traceback`` shows; with 128 plus the number of
    the signal when it is stopped, also where the reader of its output has gone.
    """
    ending.check_streams()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    ending.check_arguments(arguments)
    name = next((word for word in arguments if word in COMMANDS), "")
    quiet_libraries()
    with ending.stopping() as signals:
        try:
            code = build()(args=arguments, prog_name="kvcompress", standalone_mode=False)
        except KeyboardInterrupt:
            code = ending.INTERRUPTED
        except typer.TyperException as error:
            see = " ".join(["kvcompress", name, "--help"]).replace("  ", " ")
            ending.fail(f"{error.format_message().rstrip('.')}: see {see}")
        except Exception as error:
            if "--traceback" in arguments:
                raise
            told = ending.of_a_user(error)
            if told is None:
                ending.fail(ending.of_ours(error, name), ending.BUG)
            ending.fail(told)
    if code == ending.INTERRUPTED:
        ending.say(f"stopped; {GO_ON.get(name, 'run the same command again to start over')}")
        code = 128 + signals[0] if signals else code
    ending.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvcompress {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Print the version."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error was raised.")
    ] = False,
) -> None:
    """Shrink a language model's weights and its KV cache, per head, and run the result.

    Start with `kvcompress demo`: it profiles, plans, exports, loads and runs the model that ships
    with the package, offline.
    """
