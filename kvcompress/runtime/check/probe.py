"""Finding out what the compressed cache can do for a model, by a few short forwards.

No list of model names decides. A family that changes is noticed by its numbers, and one that we
never heard of is served if its numbers are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.plan import Budget, HeadPlan, LayerKind, ModelShape, uniform
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.check.compare import (
    distance,
    fixed_ids,
    generated,
    same_text_steps,
    tolerance,
)
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

PROMPT: Final = 40
STEPS: Final = 8
_FULL: Final = HeadPlan(full=True, k_dtype="model", v_dtype="model")
_EVICTING: Final = HeadPlan(
    frequent=Budget(tokens=6), local=Budget(tokens=8), k_dtype="model", v_dtype="model"
)

Status = Literal["yes", "limit", "no"]
Answer = tuple[Tensor, Tensor]  # tokens [STEPS] and their logits [STEPS, vocabulary]


@dataclass(frozen=True)
class Finding:
    """One thing that users ask of a cache, and whether this model's can do it.

    Attributes:
        error: distance of the logits to those of the plain way, see `compare.distance`; None where
            nothing was run.
    """

    capability: str
    status: Status
    error: float | None
    note: str


@dataclass(frozen=True)
class Capabilities:
    """What `probe` found.

    Attributes:
        layers: kinds of layers and how many of each, as in ``4 full, 20 sliding``.
        refused: why the model cannot be served at all, or None.
    """

    model: str
    model_type: str
    layers: str
    kv_heads: int
    head_dim: int
    max_position: int
    refused: str | None
    findings: tuple[Finding, ...]

    @property
    def supported(self) -> bool:
        return self.refused is None


def probe(model: PreTrainedModel, name: str | None = None) -> Capabilities:
    """Run `model` with and without a compressed cache and compare.

    The model is given back as it was, with its plan if one is attached.

    Args:
        name: what the report calls the model; None is its own path.
    """
    title = name or model.config.name_or_path or type(model).__name__
    kind = model.config.get_text_config(decoder=True).model_type
    before = attached(model)
    try:
        shape = shape_of(model.config, model.dtype)
        attach(model, uniform(shape, _FULL))
        runs = _Runs(model, shape)
        cache = runs.cache()
        if cache.status == "no":
            raise UnsupportedModelError(cache.note)
        findings = [cache, runs.padding(), runs.parts(), runs.drafts(), runs.rows()]
        findings += [runs.relative(), runs.static()]
        findings += _by_architecture(model, shape)
    except KVCompressError as error:
        return Capabilities(title, kind, "", 0, 0, 0, str(error), ())
    finally:
        detach(model)
        if before is not None:
            attach(model, *before)
    count = Counter(shape.kind(layer) for layer in range(shape.layers))
    return Capabilities(
        title,
        kind,
        ", ".join(f"{n} {k}" for k, n in count.items()),
        shape.kv_heads,
        shape.head_dim,
        shape.max_position,
        None,
        tuple(findings),
    )


class _Runs:
    """Short forwards of a model that has a plan attached."""

    def __init__(self, model: PreTrainedModel, shape: ModelShape) -> None:
        self.model, self.shape = model, shape
        self.ids = fixed_ids(model, PROMPT + STEPS)
        self.limit = tolerance(model.dtype)

    @torch.inference_mode()
    def feed(self, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocabulary]`` float32."""
        positions = None
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **as_argument(cache),
            use_cache=True,
        )
        return out.logits.float()

    def steps(self, cache: Cache, start: int = PROMPT) -> Tensor:
        """Logits of the tokens from `start` on, fed one by one."""
        rows = [self.feed(cache, token[None, None]) for token in self.ids[0, start:]]
        return torch.cat(rows, 1)

    def prompt_and_steps(self, cache: Cache) -> Tensor:
        """Logits of the prompt, fed at once, and of the tokens after it."""
        return torch.cat([self.feed(cache, self.ids[:, :PROMPT]), self.steps(cache)], 1)

    def judged(
        self, capability: str, found: Tensor, wanted: Tensor, note: str, status: Status = "yes"
    ) -> Finding:
        error = distance(found, wanted)
        if not error <= self.limit:
            return Finding(
                capability, "no", error, f"logits differ by {error:.2g}, allowed {self.limit:g}"
            )
        return Finding(capability, status, error, note)

    def generate(self, **way: int) -> Answer:
        """What `generate` makes of a prompt that says everything twice."""
        ids = self.ids[:, : PROMPT // 2].repeat(1, 2)
        return generated(self.model, ids, STEPS, min_new_tokens=STEPS, **way)[:2]

    def as_users_go(self, finding: Finding, wanted: Answer, **way: int) -> Finding:
        """The finding, unless `generate` called in this way makes something else of a prompt."""
        if finding.status == "no":
            return finding
        try:
            tokens, logits = self.generate(**way)
        except Exception as error:  # any error here is one that a user would get
            text = str(error).strip().split("\n")[0]
            return replace(finding, status="no", note=f"generate fails: {text}")
        rows = same_text_steps(tokens, wanted[0])
        judged = self.judged(
            finding.capability, logits[:rows], wanted[1][:rows], finding.note, finding.status
        )
        return judged if judged.status == "no" else finding

    def relative(self) -> Finding:
        """Relative positions under a window that holds every token must change nothing."""
        name = "relative positions (streams)"
        head = HeadPlan(local=Budget(tokens=PROMPT + STEPS), k_dtype="model", v_dtype="model")
        plan, before = uniform(self.shape, head, positions="relative"), attached(self.model)
        assert before is not None
        with self.detached() as own:
            wanted = self.prompt_and_steps(own)
        try:
            attach(self.model, plan)
            cache = new_cache(self.model)
            found = self.prompt_and_steps(cache)
        except KVCompressError as error:
            return Finding(name, "no", None, str(error))
        finally:
            attach(self.model, *before)
        return self.judged(name, found, wanted, "keys can be turned: contexts without end")

    def static(self) -> Finding:
        """Fixed arrays against growing ones, without compiling them."""
        name = "fixed arrays (compiled)"
        plan = attached(self.model)
        assert plan is not None
        try:
            fixed = StaticCompressedCache(*plan, batch=1, max_tokens=PROMPT + STEPS)
            self.feed(fixed, self.ids[:, :PROMPT])
            found = self.steps(fixed)
        except KVCompressError as error:
            return Finding(name, "no", None, str(error))
        growing = new_cache(self.model)
        self.feed(growing, self.ids[:, :PROMPT])
        return self.judged(name, found, self.steps(growing), "equal the growing cache")

    @contextmanager
    def detached(self) -> Iterator[DynamicCache]:
        """The model as transformers made it, with an empty cache of its own."""
        plan = attached(self.model)
        assert plan is not None
        detach(self.model)
        try:
            yield DynamicCache(config=self.model.config)
        finally:
            attach(self.model, *plan)

    def cache(self) -> Finding:
        with self.detached() as own:
            wanted = self.prompt_and_steps(own)
            plain = self.generate()
        ours = new_cache(self.model)
        found = self.prompt_and_steps(ours)
        note = "equals transformers' own where nothing goes, through generate too"
        return self.as_users_go(self.judged("cache", found, wanted, note), plain)

    def padding(self) -> Finding:
        name, pads = "padded batches", 9
        ids = torch.cat([self.ids[:, :PROMPT], self.ids[:, :PROMPT].roll(pads, 1)])
        mask = torch.ones_like(ids)
        mask[1, :pads] = 0
        found = self.feed(new_cache(self.model), ids, mask)[1:, pads:]
        alone = self.feed(new_cache(self.model), self.ids[:, : PROMPT - pads])
        finding = self.judged(name, found, alone, "a padded row equals the row alone")
        if finding.status == "yes":
            return finding
        with self.detached() as own:
            theirs = self.feed(own, ids, mask)[1:, pads:]
        note = "as transformers' own: this model counts padding, a padded row differs from the row"
        return self.judged(name, found, theirs, note, "limit")

    def parts(self) -> Finding:
        cache = new_cache(self.model)
        found = torch.cat([self.feed(cache, p) for p in self.ids[:, :PROMPT].split(11, 1)], 1)
        wanted = self.feed(new_cache(self.model), self.ids[:, :PROMPT])
        finding = self.judged("prompts in parts", found, wanted, "equal a prompt at once")
        return self.as_users_go(finding, self.generate(), prefill_chunk_size=11)

    def rows(self) -> Finding:
        cache = new_cache(self.model)
        self.feed(cache, torch.cat([self.ids[:, :PROMPT], self.ids[:, :PROMPT].flip(1)]))
        cache.reorder_cache(torch.LongTensor([1, 0]))
        token = self.ids[:, PROMPT : PROMPT + 1]
        found = self.feed(cache, token.repeat(2, 1))[1:]
        alone = new_cache(self.model)
        self.feed(alone, self.ids[:, :PROMPT])
        return self.judged("beams", found, self.feed(alone, token), "rows can be reordered")

    def drafts(self) -> Finding:
        """Under eviction: a rejected draft must leave no trace."""
        name = "drafts (assisted, lookup)"
        kinds = {self.shape.kind(layer) for layer in range(self.shape.layers)}
        if "linear" in kinds:
            return Finding(name, "no", None, "transformers refuses them for models with a state")
        exact = not kinds & {"shared", "latent"}
        plan = attached(self.model)
        assert plan is not None
        if exact:
            attach(self.model, uniform(self.shape, _EVICTING, sink_tokens=2, recent_tokens=4))
        try:
            cache, plain = new_cache(self.model), new_cache(self.model)
            for one in (cache, plain):
                self.feed(one, self.ids[:, :PROMPT])
            cache.activate_past_recording()
            self.feed(cache, self.ids[:, PROMPT:])
            cache.crop(-STEPS)
            self.feed(cache, self.ids[:, PROMPT:])
            cache.crop(-(STEPS // 2))
            half = PROMPT + STEPS // 2
            found, wanted = self.steps(cache, half), self.steps(plain)[:, STEPS // 2 :]
            note = "equal plain decoding, under eviction too"
            if not exact:
                note = "equal plain decoding only where nothing is evicted"
            finding = self.judged(name, found, wanted, note, "yes" if exact else "limit")
            return self.as_users_go(finding, self.generate(), prompt_lookup_num_tokens=3)
        finally:
            attach(self.model, *plan)


def _by_architecture(model: PreTrainedModel, shape: ModelShape) -> list[Finding]:
    """Findings that follow from the kinds of layers, without a run."""
    kinds = {shape.kind(layer) for layer in range(shape.layers)}
    plain = kinds <= {"full", "sliding"}
    learned = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    findings = []
    if "latent" in kinds:
        note = "one budget per layer; latents are decoded at every step, for the model to expand"
        findings.append(Finding("budgets", "limit", None, note))
    elif kinds & {"shared", "linear", "none"}:
        note = "per head, in the layers that store keys; the other layers are transformers' own"
        findings.append(Finding("budgets", "yes", None, note))
    else:
        findings.append(Finding("budgets", "yes", None, "per layer and KV head"))
    findings.append(_tensor_parallel(shape, kinds))
    reason = ", ".join(sorted(kinds - {"full", "sliding"})) + " layers"
    if plain and not learned:
        findings.append(Finding("profile and planner", "yes", None, "every KV head is measured"))
    else:
        reason = reason if not plain else "learned sinks"
        note = f"{reason} are not measured yet: make a plan by hand"
        findings.append(Finding("profile and planner", "no", None, note))
    return findings


def _tensor_parallel(shape: ModelShape, kinds: set[LayerKind]) -> Finding:
    name = "tensor parallel"
    sizes = [n for n in range(2, shape.kv_heads + 1) if shape.kv_heads % n == 0]
    if "latent" in kinds:
        return Finding(name, "no", None, "every process would need the whole latent")
    if not sizes:
        return Finding(name, "no", None, "one KV head cannot be divided")
    return Finding(name, "yes", None, f"over {', '.join(map(str, sizes))} processes, by KV head")


def as_rows(found: Capabilities) -> list[dict[str, str]]:
    """The findings as a table."""
    if found.refused is not None:
        return [{"capability": "any", "status": "refused", "error": "", "note": found.refused}]
    return [
        {
            "capability": f.capability,
            "status": f.status,
            "error": "" if f.error is None else f"{f.error:.1e}",
            "note": f.note,
        }
        for f in found.findings
    ]
