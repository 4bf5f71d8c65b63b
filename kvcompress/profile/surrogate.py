"""Training the linear surrogate of KVzip+ on the model at hand.

Teacher: log s⁺ of `evict.scorers.kvzip`, of both halves of every calibration prompt, read twice.
Student: per layer and KV head, ridge regression of log s⁺ on the input of the attention module, in
closed form from moments. Only the moments are ever kept, no hidden state and no token.

With x the inputs, C and c the covariances of x with itself and with log s⁺, and Λ = λ · diag(C):
    w = (C + Λ)⁻¹ c,  b = mean of log s⁺ − w · mean of x
so that λ does not depend on the scale of a channel. One λ for each layer is chosen on the last
quarter of the prompts, which are not trained on; R² is reported on the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvcompress.errors import CalibrationError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import ModelShape
from kvcompress.profile.repeat import ScoredContext, contexts_of, score_context
from kvcompress.profile.workplace import Workplace
from kvcompress.recipe import Keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER: Final = "kvzip_plus"
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FLOOR: Final = 1e-8  # lower scores count as this: their order is useless and would bend the fit
KEPT: Final = "surrogate"
_HELD_OUT_SHARE: Final = 4
_STILL: Final = 1e-12  # a channel that varies by less of its mean square never moves


@dataclass(slots=True)
class Moments:
    """Sums over the tokens of one layer, float64, on the CPU; a 1 stands behind the inputs.

    Attributes:
        square: ``[F, F]`` Σ x xᵀ, F = hidden + 1, its last entry the number of tokens.
        cross: ``[F, Hkv]`` Σ x log s⁺.
    """

    square: Tensor
    cross: Tensor

    @staticmethod
    def of(context: ScoredContext) -> Moments:
        x, y = samples(context)
        return Moments((x.mT @ x).cpu(), (x.mT @ y).cpu())

    def add(self, other: Moments) -> None:
        self.square += other.square
        self.cross += other.cross

    def fit(self, ridge: float) -> Tensor:
        """Weights ``[Hkv, F]`` float64, b last."""
        count = self.square[-1, -1]
        mean, target = self.square[-1, :-1] / count, self.cross[-1] / count
        covariance = self.square[:-1, :-1] / count - mean[:, None] * mean
        shared = self.cross[:-1] / count - mean[:, None] * target
        variance = covariance.diagonal()
        # the variance of a channel that never moves is rounding noise: it gets weight 0
        moves = variance > _STILL * self.square.diagonal()[:-1] / count
        scale = torch.where(moves, variance.clamp(min=0).sqrt(), torch.inf)
        correlation = covariance / scale[:, None] / scale
        penalty = torch.full_like(scale, ridge).diag()
        standard = torch.linalg.solve(correlation + penalty, shared / scale[:, None])
        weight = standard / scale[:, None]
        return torch.cat([weight, (target - mean @ weight)[None]]).mT.contiguous()


@dataclass(frozen=True, slots=True)
class Errors:
    """Sums of the errors of several students on held-out tokens of one layer, float64.

    Attributes:
        squared: ``[students, Hkv]`` Σ of squared errors.
        count, total, total_squared: number, sum ``[Hkv]`` and sum of squares ``[Hkv]`` of the log
            scores themselves.
    """

    squared: Tensor
    count: Tensor
    total: Tensor
    total_squared: Tensor

    @staticmethod
    def of(context: ScoredContext, students: Tensor) -> Errors:
        """For `students` ``[students, Hkv, F]``."""
        x, y = samples(context)
        missed = torch.einsum("nf,shf->snh", x, students.to(x.device)) - y
        return Errors(
            missed.square().sum(1).cpu(),
            torch.tensor(float(len(y)), dtype=torch.float64),
            y.sum(0).cpu(),
            y.square().sum(0).cpu(),
        )

    def plus(self, other: Errors) -> Errors:
        return Errors(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def r2(self) -> Tensor:
        """``[students, Hkv]``: 1 − squared error over that of the mean."""
        spread = self.total_squared - self.total.square() / self.count
        return 1 - self.squared / spread.clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The trained weights and how well they predict.

    Attributes:
        weights: per layer ``[Hkv, hidden + 1]`` float32, the constant last.
        r2: ``[L, Hkv]`` on held-out prompts.
        ridges: λ of each layer.
    """

    weights: tuple[Tensor, ...]
    r2: Tensor
    ridges: tuple[float, ...]

    def table(self) -> tuple[tuple[float, ...], ...]:
        """`r2` for the profile, four digits."""
        return tuple(tuple(round(x, 4) for x in layer) for layer in self.r2.tolist())


def needed(keep: Keep) -> bool:
    """Whether the scorer of a recipe has to be trained."""
    return KEPT in scorer(keep.scorer).trained


def samples(context: ScoredContext) -> tuple[Tensor, Tensor]:
    """(``[N, F]`` inputs with a 1 behind them, ``[N, Hkv]`` log scores), float64.

    Tokens that the repetition could not see, behind an architecture's own window, are left out.
    """
    x = context.hidden[context.seen].double()
    y = context.score[:, context.seen].double().clamp(min=FLOOR).log().mT
    return torch.cat([x, torch.ones_like(x[:, :1])], 1), y


def train(
    model: PreTrainedModel,
    shape: ModelShape,
    prompts: Sequence[list[int]],
    opening_tokens: int,
    place: Workplace,
    step: Callable[[int], None],
) -> Surrogate:
    """Train on the first prompts and measure on the last; a stopped training goes on.

    Takes 8 · L · (hidden + 1)² bytes of memory, and as many on disk until it is done.

    Args:
        opening_tokens: ids at the head of each prompt that every text begins with.
        step: told of every finished prompt.

    Raises:
        CalibrationError: for fewer than 2 prompts.
    """
    if len(prompts) < 2:
        raise CalibrationError(
            "the surrogate is trained on some prompts and measured on others: set "
            "calibration.prompts to 2 or more"
        )
    held_out = max(1, len(prompts) // _HELD_OUT_SHARE)
    trained = len(prompts) - held_out
    moments = _train_moments(model, shape, prompts[:trained], opening_tokens, place, step)
    students = [torch.stack([layer.fit(ridge) for ridge in RIDGES]) for layer in moments]
    sums: list[Errors] = []
    for number, ids in enumerate(prompts[trained:], trained):
        name = f"{number:04d}.{KEPT}"
        own = _held_out_errors(model, shape, ids, opening_tokens, students, place, name)
        sums = [a.plus(b) for a, b in zip(sums, own, strict=True)] if sums else own
        step(1)
    best = [int(errors.squared.sum(1).argmin()) for errors in sums]
    return Surrogate(
        tuple(layer[i].float() for layer, i in zip(students, best, strict=True)),
        torch.stack([errors.r2()[i] for errors, i in zip(sums, best, strict=True)]),
        tuple(RIDGES[i] for i in best),
    )


def _score(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: list[int],
    opening_tokens: int,
    note: Callable[[ScoredContext], None],
) -> None:
    for context in contexts_of(ids, opening_tokens):
        score_context(model, shape, context, (), TEACHER, note)


def _train_moments(
    model: PreTrainedModel,
    shape: ModelShape,
    prompts: Sequence[list[int]],
    opening_tokens: int,
    place: Workplace,
    step: Callable[[int], None],
) -> list[Moments]:
    sums: dict[int, Moments] = {}

    def note(context: ScoredContext) -> None:
        own = Moments.of(context)
        if context.layer in sums:
            sums[context.layer].add(own)
        else:
            sums[context.layer] = own

    kept = place.kept(KEPT)
    done = int(kept["prompts"]) if kept else 0
    if kept:
        sums = {i: Moments(kept[f"{i}.square"], kept[f"{i}.cross"]) for i in range(shape.layers)}
    for number, ids in enumerate(prompts):
        if number >= done:
            _score(model, shape, ids, opening_tokens, note)
            tensors = {"prompts": torch.tensor(number + 1)}
            for layer, moments in sums.items():
                tensors[f"{layer}.square"] = moments.square
                tensors[f"{layer}.cross"] = moments.cross
            place.keep(KEPT, tensors)
        step(1)
    return [sums[i] for i in range(shape.layers)]


def _held_out_errors(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: list[int],
    opening_tokens: int,
    students: Sequence[Tensor],
    place: Workplace,
    name: str,
) -> list[Errors]:
    """Errors on one prompt, per layer."""
    names = [f.name for f in fields(Errors)]
    layers = range(shape.layers)

    def measured() -> dict[str, Tensor]:
        sums: dict[int, Errors] = {}

        def note(context: ScoredContext) -> None:
            own = Errors.of(context, students[context.layer])
            before = sums.get(context.layer)
            sums[context.layer] = own if before is None else before.plus(own)

        _score(model, shape, ids, opening_tokens, note)
        return {n: torch.stack([getattr(sums[i], n) for i in layers]) for n in names}

    kept = place.step(name, measured)
    return [Errors(**{n: kept[n][i] for n in names}) for i in layers]
