"""The settings of other engines that come closest to a plan: what `kvcompress plan --for` prints.

Other engines keep every token and have one code for all heads, vLLM with layers left out. Of their
settings the smallest is taken that is expected to lose no more than the plan; where all lose more,
the one that loses least. A setting's loss is that of our code with the same bits, as the profile
measured it. Theirs has no static centre: where keys have large biases it loses more
(docs/codes.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from kvcompress.accounting import kv_bytes
from kvcompress.errors import PlanError
from kvcompress.plan import HeadPlan, KVDtype, Plan
from kvcompress.profile.assemble import expected
from kvcompress.profile.store import Profile

_WHOLE_BITS: Final = 16.0


class Setting(NamedTuple):
    """A code of an engine.

    Attributes:
        words: as one types it.
        k, v: our codes of the same bits.
        k_bits, v_bits: of a number, without scales.
        scale_bits: of the scales that each block of channels has.
        block: channels that share them; None is the whole vector.
    """

    words: str
    k: KVDtype
    v: KVDtype
    k_bits: float
    v_bits: float
    scale_bits: float = 0.0
    block: int | None = None

    def bits(self, head_dim: int, v_dim: int) -> float:
        """Of a token in one head."""
        k_scales = 1 if self.block is None else head_dim / self.block
        v_scales = 1 if self.block is None else v_dim / self.block
        scales = self.scale_bits * (k_scales + v_scales)
        return self.k_bits * head_dim + self.v_bits * v_dim + scales


_GENERATE: Final = 'generate(…, cache_implementation="quantized", cache_config='
ENGINES: Final[dict[str, tuple[Setting, ...]]] = {
    "vllm": (
        Setting("--kv-cache-dtype fp8", "fp8", "fp8", 8, 8),
        Setting("--kv-cache-dtype int8_per_token_head", "int8", "int8", 8, 8, 32),
        Setting("--kv-cache-dtype int4_per_token_head", "int4", "int4", 4, 4, 32),
        Setting("--kv-cache-dtype turboquant_4bit_nc", "rot4", "rot4", 4, 4, 16),
        Setting("--kv-cache-dtype turboquant_3bit_nc", "rot3", "rot3", 3, 3, 16),
    ),
    "llama.cpp": (
        Setting("-fa on -ctk q8_0 -ctv q8_0", "int8", "int8", 8, 8, 16, 32),
        Setting("-fa on -ctk q8_0 -ctv q4_0", "int8", "int4", 8, 4, 16, 32),
        Setting("-fa on -ctk q4_0 -ctv q4_0", "int4", "int4", 4, 4, 16, 32),
    ),
    "transformers": (
        Setting(f'{_GENERATE}{{"backend": "hqq", "nbits": 8}})', "int8", "int8", 8, 8, 32, 64),
        Setting(f'{_GENERATE}{{"backend": "quanto", "nbits": 4}})', "int4", "int4", 4, 4, 32, 64),
    ),
}
SKIPS: Final = "--kv-cache-dtype-skip-layers"


@dataclass(frozen=True)
class Closest:
    """What an engine offers beside a plan.

    Attributes:
        skipped: layers that stay in 16 bits.
        kv_bytes, loss: at the context and batch that were asked for; the plan's own beside them.
    """

    engine: str
    words: str
    skipped: tuple[int, ...]
    kv_bytes: int
    loss: float
    plan_bytes: int
    plan_loss: float

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "engine": self.engine,
            "setting": self.words,
            "kv_bytes": self.kv_bytes,
            "expected_loss": self.loss,
            "plan_kv_bytes": self.plan_bytes,
            "plan_expected_loss": self.plan_loss,
        }

    def said(self, unit: str) -> str:
        """For a terminal."""
        return (
            f"closest in {self.engine}: {self.words}\n"
            f"{self.kv_bytes:,} bytes and {self.loss:.3g} {unit}, measured with our code of the "
            f"same bits; this plan: {self.plan_bytes:,} bytes and {self.plan_loss:.3g}"
        )


def closest(profile: Profile, plan: Plan, engine: str, context: int, batch: int) -> Closest:
    """See the module docstring.

    Raises:
        PlanError: for an engine that is not known, a profile without losses, or a plan whose loss
            is not known.
    """
    if engine not in ENGINES:
        raise PlanError(f"--for {engine}: give one of {', '.join(ENGINES)}")
    profile.need("losses", f"--for {engine}")
    if plan.predicted_loss is None:
        raise PlanError(
            f"--for {engine}: the loss of this plan is not known, so nothing is near it"
        )
    most = plan.predicted_loss
    offers = list(_offers(profile, engine, context, batch))
    if not offers:
        raise PlanError(f"--for {engine}: this profile measured none of its codes; profile again")
    fit = [offer for offer in offers if offer[1] <= most]
    size, loss, words, skipped = min(fit) if fit else min(offers, key=lambda o: (o[1], o[0]))
    own = kv_bytes(plan, context, batch)
    return Closest(engine, words, skipped, size, loss, own, most)


def _offers(
    profile: Profile, engine: str, context: int, batch: int
) -> Iterator[tuple[int, float, str, tuple[int, ...]]]:
    """(bytes, expected loss, words, skipped layers) of every setting."""
    shape = profile.shape
    found = {head: column for column, head in enumerate(profile.candidates) if head.full}
    for setting in ENGINES[engine]:
        head = HeadPlan(full=True, k_dtype=setting.k, v_dtype=setting.v)
        if head not in found:
            continue
        layers = [sum(row[found[head]] for row in layer) for layer in profile.losses]
        order = sorted(range(len(layers)), key=lambda i: -layers[i])
        coded = setting.bits(shape.head_dim, shape.v_dim)
        whole = _WHOLE_BITS * (shape.head_dim + shape.v_dim)
        for count in range(len(order) // 2 + 1 if engine == "vllm" else 1):
            skipped = tuple(sorted(order[:count]))
            loss = expected(
                profile, float(sum(x for i, x in enumerate(layers) if i not in skipped))
            )
            bits = (len(layers) - count) * coded + count * whole
            size = round(bits * shape.kv_heads * context * batch / 8)
            words = setting.words
            if skipped:
                words += f" {SKIPS} {' '.join(map(str, skipped))}"
            yield size, loss, words, skipped
