"""What each code of keys and of values is expected to cost, layer by layer, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvcompress.accounting import slot_bytes
from kvcompress.plan import HeadPlan, KVDtype
from kvcompress.profile.assemble import expected
from kvcompress.profile.candidates import ALONE
from kvcompress.profile.store import Profile
from kvcompress.storage import PAIRS

if TYPE_CHECKING:
    from rich.console import RenderableType

FINE: Final = (0.01, 0.05)  # nats that advice is given for
SHOWN_LAYERS: Final = 8
_PARTS: Final = ("keys", "values")


@dataclass(frozen=True)
class CodeCosts:
    """Losses of codes where every head keeps every token.

    Attributes:
        codes: those that were measured.
        unit: of losses, as in `Profile.loss_unit`.
        layers: for each layer, of keys and of values, the expected losses of `codes` where they
            are stored so in this layer alone and everything else is exact.
        whole: the same, in all layers at once.
        pairs: (keys' code, values' code, bits a number, expected loss), the most bits first.
    """

    codes: tuple[KVDtype, ...]
    unit: str
    layers: tuple[dict[str, tuple[float, ...]], ...]
    whole: dict[str, tuple[float, ...]]
    pairs: tuple[tuple[KVDtype, KVDtype, float, float], ...]

    def total(self, part: str, code: KVDtype) -> float:
        return self.whole[part][self.codes.index(code)]

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        layers = [
            {part: dict(zip(self.codes, layer[part], strict=True)) for part in _PARTS}
            for layer in self.layers
        ]
        names = ("keys", "values", "bits", "loss")
        pairs = [dict(zip(names, pair, strict=True)) for pair in self.pairs]
        return {"unit": self.unit, "layers": layers, "pairs": pairs, "advice": self.advice()}

    def advice(self) -> list[str]:
        """Sentences."""
        said = []
        for most in FINE if self.unit == "nats" else ():
            fit = [pair for pair in self.pairs if pair[3] <= most]
            if fit:
                k, v, bits, nats = min(fit, key=lambda pair: (pair[2], pair[3]))
                said.append(
                    f"with every token, {k} keys and {v} values are the fewest bits that are "
                    f"expected to cost at most {most:g} nats: {bits:.2f} bits a number, {nats:.2g}"
                )
        code = self.codes[-1]
        keys, values = self.total("keys", code), self.total("values", code)
        if keys > 0 and values > 0:
            more, less = ("keys", "values") if keys >= values else ("values", "keys")
            factor = max(keys, values) / min(keys, values)
            said.append(f"in {code}, {more} lose {factor:.1f} times what {less} do")
        worst = sorted(range(len(self.layers)), key=lambda i: -self._both(i, -1))
        names = ", ".join(map(str, sorted(worst[: max(1, len(worst) // 8)])))
        return [*said, f"in {code}, most is lost in layers {names}"]

    def table(self) -> RenderableType:
        """For a terminal: the layers that lose most, and all of them together."""
        from rich.console import Group
        from rich.table import Table

        grid = Table("layer", *(f"{part} {code}" for part in _PARTS for code in self.codes))
        order = sorted(range(len(self.layers)), key=lambda i: -self._both(i, -1))
        for number in sorted(order[:SHOWN_LAYERS]):
            layer = self.layers[number]
            grid.add_row(str(number), *(f"{x:.2g}" for part in _PARTS for x in layer[part]))
        totals = [self.total(part, code) for part in _PARTS for code in self.codes]
        grid.add_row("all", *(f"{x:.2g}" for x in totals))
        head = f"expected loss of each code in one layer alone, every token kept, {self.unit}"
        if len(self.layers) > SHOWN_LAYERS:
            head += f"; the {SHOWN_LAYERS} layers that lose most"
        return Group(head, grid, *self.advice())

    def _both(self, layer: int, place: int) -> float:
        return sum(self.layers[layer][part][place] for part in _PARTS)


def code_costs(profile: Profile) -> CodeCosts | None:
    """Of a profile that has them; None of one without losses, or of an earlier version."""
    found = {head: column for column, head in enumerate(profile.candidates) if head.full}
    alone = {code: _alone(code) for code in ALONE}
    codes = tuple(code for code, heads in alone.items() if {*heads} <= {*found})
    if not codes:
        return None

    def lost(head: HeadPlan, layers: Sequence[int]) -> float:
        rows = (row for layer in layers for row in profile.losses[layer])
        return expected(profile, float(sum(row[found[head]] for row in rows)))

    def parts(layers: Sequence[int]) -> dict[str, tuple[float, ...]]:
        return {
            part: tuple(lost(alone[code][place], layers) for code in codes)
            for place, part in enumerate(_PARTS)
        }

    every = range(len(profile.losses))
    pairs = []
    for k, v in PAIRS:
        head = HeadPlan(full=True, k_dtype=k, v_dtype=v)
        if head in found:
            numbers = profile.shape.head_dim + profile.shape.v_dim
            bits = 8 * slot_bytes(head, profile.shape) / numbers
            pairs.append((k, v, bits, lost(head, every)))
    layers = tuple(parts([number]) for number in every)
    return CodeCosts(codes, profile.loss_unit, layers, parts(every), tuple(pairs))


def _alone(code: KVDtype) -> tuple[HeadPlan, HeadPlan]:
    """Keys in this code and exact values; exact keys and values in it."""
    return (
        HeadPlan(full=True, k_dtype=code, v_dtype="model"),
        HeadPlan(full=True, k_dtype="model", v_dtype=code),
    )
