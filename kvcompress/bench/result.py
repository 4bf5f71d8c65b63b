"""What a benchmark found, as JSON holds it: raw windows, bytes and conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from kvcompress.errors import KVCompressError
from kvcompress.measure.stats import Spread, spread
from kvcompress.measure.timing import Samples
from kvcompress.plan import ByteCount, NonNegativeInt, PositiveInt, StrictModel, explain
from kvcompress.strict import JSON_LIMIT_BYTES, NotStrictError, load_json, read_text

Number = Annotated[float, Field(ge=0)]
Kind = Literal["ours", "peer", "artefact", "limit"]


class Timing(StrictModel):
    """Milliseconds of one step, a figure per round.

    Attributes:
        steps: of one round, timed together.
        faults: minor page faults of a step, a figure per round.
    """

    steps: PositiveInt
    wall_ms: tuple[Number, ...]
    cpu_ms: tuple[Number, ...]
    faults: tuple[ByteCount, ...] = ()

    @classmethod
    def of(cls, samples: Samples) -> Timing:
        return cls(
            steps=samples.windows[0].steps,
            wall_ms=tuple(round(x, 4) for x in samples.wall_ms()),
            cpu_ms=tuple(round(x, 4) for x in samples.cpu_ms()),
            faults=samples.faults(),
        )

    @property
    def wall(self) -> Spread:
        return spread(self.wall_ms)

    @property
    def cpu_per_wall(self) -> float:
        """1 for one busy thread; below that the process waited, for the machine or for input."""
        return sum(self.cpu_ms) / max(1e-9, sum(self.wall_ms))


def speedup(ours: Timing, theirs: Timing) -> Spread:
    """How many times as long `theirs` took, round by round.

    Raises:
        ValueError: where the two were not timed in the same rounds.
    """
    if len(ours.wall_ms) != len(theirs.wall_ms):
        raise ValueError(f"{len(ours.wall_ms)} and {len(theirs.wall_ms)} rounds: not one run")
    return spread([b / a for a, b in zip(ours.wall_ms, theirs.wall_ms, strict=True)])


class Facts(StrictModel):
    """What there is to know of a case beside its timing.

    Attributes:
        kind: ``artefact`` is a peer that something other than its cache slows down, ``limit`` a
            bound of ours rather than a rival.
        weights: their format, as in ``float32``.
        fill: ``synthetic`` random keys and values, or a ``prompt`` that the model read.
        process: ``own`` where it ran in a process of its own, alternating with the others.
        kv_bytes: of all tensors of the cache after the prompt, measured.
        weights_bytes: of all parameters and buffers.
        read_bytes: that a step has to read at least, None where no such bound is meant.
        prompt: milliseconds that a prompt of one row took to read.
        quality: name of the cell of quality.json that measures the same plan.
        detail: what else there is to know, in words.
    """

    name: str
    kind: Kind
    context_tokens: NonNegativeInt
    batch: PositiveInt
    threads: PositiveInt
    weights: str
    fill: Literal["synthetic", "prompt"]
    process: Literal["shared", "own"] = "shared"
    kv_bytes: ByteCount
    weights_bytes: ByteCount
    read_bytes: ByteCount | None = None
    prompt: Timing | None = None
    quality: str | None = None
    detail: str = ""


class Row(Facts):
    """One case."""

    timing: Timing


class Bandwidth(StrictModel):
    """Passes over a large buffer in the same rounds, one pass per step."""

    threads: PositiveInt
    read_bytes: ByteCount
    read: Timing
    copied_bytes: ByteCount
    copy_: Timing = Field(alias="copy")

    @property
    def read_gb_s(self) -> float:
        """Decimal gigabytes per second, of the median pass."""
        return self.read_bytes / self.read.wall.median / 1e6

    @property
    def copy_gb_s(self) -> float:
        """Read and written, as `read_gb_s`."""
        return self.copied_bytes / self.copy_.wall.median / 1e6


class Missing(StrictModel):
    """A case that was not timed, and why."""

    name: str
    reason: str


class Cell(StrictModel):
    """Cases that were timed in the same rounds."""

    name: str
    rounds: PositiveInt
    warm_rounds: NonNegativeInt
    load_before: tuple[float, ...]
    load_after: tuple[float, ...]
    seconds: Number
    bandwidths: tuple[Bandwidth, ...]
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...] = ()

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def bandwidth(self, threads: int) -> Bandwidth | None:
        return next((b for b in self.bandwidths if b.threads == threads), None)

    def floor_ms(self, row: Row) -> float | None:
        """Time to read what a step has to read, at the bandwidth of the same rounds."""
        found = self.bandwidth(row.threads)
        if found is None or row.read_bytes is None:
            return None
        return row.read_bytes / found.read_gb_s / 1e6


class Conditions(StrictModel):
    """What must be equal for two runs to be one."""

    cpu: str
    cores: PositiveInt
    memory_bytes: ByteCount | None
    last_cache_bytes: ByteCount | None
    device: str
    malloc: str
    model: str
    kernels: str
    versions: dict[str, str]


class Result(StrictModel):
    """One benchmark."""

    schema_version: Literal[1] = 1
    benchmark: str
    command: str
    date: str
    conditions: Conditions
    frequency_mhz: Number | None = None
    cells: tuple[Cell, ...] = ()

    def cell(self, name: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.name == name), None)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result.

        Raises:
            KVCompressError: naming what is wrong with the file.
        """
        try:
            text = read_text(path, JSON_LIMIT_BYTES)
            load_json(text)
            return cls.model_validate_json(text)
        except NotStrictError as error:
            raise KVCompressError(f"{path}: {error}; measure again") from None
        except ValidationError as error:
            raise KVCompressError(f"{path}: {explain(error)}; measure again") from None
