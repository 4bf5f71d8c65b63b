"""What the league measured, as one value on disk: conditions, entries, cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from kvcompress.atomic import write_file
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.league.entries import Role, Skipped, Storage
from kvcompress.plan import StrictModel, explain

POINTS: Final = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 40)


class LeagueError(KVCompressError):
    """A league that cannot be run or read."""


class Conditions(StrictModel):
    """Under what the cells were measured.

    Attributes:
        date: when the last cell was finished, ISO format.
        model: its name, and the sha256 over a sample of its weights.
        machine: in words.
        lengths: per workload the tokens at which bytes are counted.
        calibration: what the profiles were taken on.
        shared_windows: runs of `window_tokens` tokens that calibration and evaluation share.
        other_code: cells that were kept from another version of this package's code.
        seconds: of all cells together, in all processes.
    """

    date: str
    model: str
    weights_hash: str
    machine: str
    device: str
    dtype: str
    versions: dict[str, str]
    context_tokens: int
    samples: int
    seed: int
    storage: Storage
    lengths: dict[str, int]
    calibration: str
    window_tokens: int
    shared_windows: int
    other_code: int = 0
    seconds: float = 0.0


class Row(StrictModel):
    """An entry, without its recipe."""

    name: str
    role: Role
    description: str
    same_as: tuple[str, ...] = ()


class Cell(StrictModel):
    """One entry at one byte target on one workload.

    Attributes:
        point: share of the 16-bit bytes; None for an entry at its own bytes.
        predicted_bytes: what tuning expected; None for the reference.
        predicted_nats: KL to the full cache that the plan's profile expects; None where it cannot.
        short: how the bytes fall short of the target; empty where they do not.
        outcome: None where `error` says what went wrong, or why the target cannot be reached.
        unreachable: the entry has no plan so small; not a failure.
    """

    entry: str
    workload: str
    point: float | None
    predicted_bytes: int | None = None
    predicted_nats: float | None = None
    short: str = ""
    outcome: WorkloadOutcome | None = None
    error: str = ""
    unreachable: bool = False
    seconds: float = 0.0


class League(StrictModel):
    """See the module docstring.

    Attributes:
        points: byte targets as shares of the 16-bit bytes, the largest first.
        workloads: names, in the order of their axes.
    """

    schema_version: Literal[1] = 1
    conditions: Conditions
    points: tuple[float, ...]
    workloads: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...] = ()

    def save(self, path: Path, **more: object) -> None:
        """Write it with one row and one cell on a line; `more` are further keys, derived ones."""
        data = self.model_dump(mode="json") | more
        lines = []
        for key, value in data.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
                lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        write_file(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> League:
        """Read what `save` wrote; derived keys are left out, they are computed anew.

        Raises:
            LeagueError: if the file cannot be read, or is of another schema.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {key: data[key] for key in cls.model_fields if key in data}
            return cls.model_validate_json(json.dumps(known))
        except ValidationError as error:
            raise LeagueError(f"{path}: {explain(error)}; run the league again") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise LeagueError(
                f"{path}: cannot read the league ({error}); give a league.json"
            ) from None


def point_name(point: float | None) -> str:
    """``1/8``, ``1/40``; ``its own bytes`` for None."""
    if point is None:
        return "its own bytes"
    whole = round(1 / point)
    return f"1/{whole}" if abs(1 / whole - point) < 1e-9 else f"{point:g}"
