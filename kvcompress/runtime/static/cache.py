"""A compressed cache of fixed size, whose decode step `torch.compile` takes as one graph.

    cache = StaticCompressedCache(plan, params, batch=1, max_tokens=4096)
    logits = model(prompt, cache=cache).logits  # eager
    decode = torch.compile(model, fullgraph=True)
    logits = decode(token, cache=cache).logits  # one graph for every token

Prompts run eagerly through the code of the growing cache; what they leave is laid into arrays that
keep their addresses for the cache's life. A forward with one token then follows the rules of
`step.store_token`, on tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NoReturn, cast, final, get_args

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.spans import Span
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo
from kvcompress.runtime.layer.layer import AbstractLayer, CompressedLayer, Spans
from kvcompress.runtime.static.moves import freeze, thaw
from kvcompress.runtime.static.state import Sizes, StaticState, static_cache_bytes
from kvcompress.runtime.static.step import decode_step
from kvcompress.runtime.static.triton_step import (
    Kernels,
    StepTables,
    choose_kernels,
    step_tables,
    triton_step,
)
from kvcompress.runtime.store.state import MOST_TOKENS, LayerSettings

__all__ = ["StaticCompressedCache", "static_cache_bytes"]

_STEP: Final = ForwardInfo(length=1)
_SERVED: Final = frozenset({"full", "sliding", "chunked"})


@final
class StaticCompressedLayer(AbstractLayer):
    """One layer: grows while a prompt comes in, lies in fixed arrays (`frozen`) while decoding.

    Attributes:
        fixed: allocated with the first prompt, for good.
        tables: where the Triton kernels decode.
    """

    is_compileable = True

    def __init__(
        self,
        settings: LayerSettings,
        spans: Spans,
        sizes: Sizes,
        classes: _StepClasses,
        kernels: Kernels,
    ) -> None:
        super().__init__(settings, spans)
        self.sizes, self.classes, self.kernels = sizes, classes, kernels
        self._growing = CompressedLayer(settings, spans)
        self.sliding_window = self._growing.sliding_window
        self.is_sliding = self._growing.is_sliding
        self.frozen = False
        self.fixed: StaticState | None = None
        self.tables: StepTables | None = None

    @property
    def growing(self) -> CompressedLayer:
        return self._growing

    @property
    def decoding(self) -> StaticState | None:
        """The arrays, while they are what the layer holds."""
        return self.fixed if self.frozen else None

    # ---- storage
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        found = (key_states.dtype, key_states.device)
        if self.fixed is not None and found != (self.fixed.exact_k.dtype, self.fixed.start.device):
            raise KVCompressError(
                f"the static cache holds {self.fixed.exact_k.dtype} on {self.fixed.start.device}, "
                f"the model now gives {found[0]} on {found[1]}; make a new cache"
            )
        self._growing.begin(key_states, value_states)
        self.is_initialized = True
        if self.fixed is None:
            self.classes.move(key_states.device)
            spans, batch = self.spans, key_states.shape[0]
            rows = spans if isinstance(spans, list) else [spans] * batch
            self.fixed = StaticState.empty(
                self.settings, key_states, value_states, self.sizes, rows
            )
            dims = key_states.shape[-1], value_states.shape[-1]
            if choose_kernels(self.kernels, self.settings, *dims, key_states.device):
                self.tables = step_tables(self.fixed, *dims)

    def check_prompt(self, batch: int | None, length: int) -> None:
        """Refuse a forward of `length` tokens that the arrays have no room for.

        Raises:
            KVCompressError: naming what was asked for and what the cache is made for.
        """
        sizes, total = self.sizes, int(self.get_seq_length()) + length
        if batch not in (None, sizes.batch):
            raise KVCompressError(
                f"the static cache is for {sizes.batch} rows, this batch has {batch}; "
                f"make one with batch={batch}"
            )
        if total > sizes.prompt_tokens:
            raise KVCompressError(
                f"a prompt of {total} tokens does not fit the static cache, which is for "
                f"prompt_tokens={sizes.prompt_tokens} and max_tokens={sizes.max_tokens}; "
                "make a larger one"
            )

    def thaw(self) -> None:
        """Go on as a growing layer until the next prompt ends."""
        fixed = self.decoding
        if fixed is not None:
            self._growing.resume(thaw(fixed), int(fixed.counter))
            self.frozen = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length, fixed = key_states.shape[2], self.decoding
        if fixed is not None and length == 1:
            self._answer(length)
            fixed.counter.add_(1)
            key_states._kvc_layer = self  # type: ignore[attr-defined]
            return key_states, value_states
        if torch.compiler.is_compiling():
            raise KVCompressError(
                "only one-token forwards of a static cache that holds a prompt can be compiled; "
                "run the prompt through the model itself first"
            )
        self.check_prompt(key_states.shape[0], length)
        self.thaw()
        if self._growing.ready is None:
            self.lazy_initialization(key_states, value_states)
        self._growing.announce(self._answer(length))
        self._growing.update(key_states, value_states)
        key_states._kvc_layer = self  # type: ignore[attr-defined]  # not the growing one
        return key_states, value_states

    def forward(self, call: AttentionCall) -> Tensor:
        fixed = self.decoding
        if fixed is not None:
            return self._decode(fixed, call)
        out = self._growing.forward(call)
        state, fixed = self.state, self.fixed
        assert state is not None and fixed is not None  # `update` saw to both
        freeze(state, self.seen, fixed)
        self._growing.ready, self.frozen = None, True
        return out

    def _decode(self, fixed: StaticState, call: AttentionCall) -> Tensor:
        call.check_mask()
        mask = call.mask
        valid = None if mask is None else mask[:, 0, 0, 0].expand(self.sizes.batch)
        flags = self.classes.flags() if self.settings.uses_classes else None
        if self.tables is None:
            return decode_step(fixed, call, valid, flags)
        return triton_step(
            fixed,
            self.tables,
            call.query,
            call.key,
            call.value,
            valid,
            flags,
            call.scaling,
            call.softcap,
            call.sinks,
        )

    # ---- what transformers calls
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def get_seq_length(self) -> Any:
        """Tokens seen, kept or not: a number before the first prompt, then an int64 scalar."""
        fixed = self.decoding
        return self.seen if fixed is None else fixed.counter

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return self.sizes.max_tokens

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        return self.sizes.batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        fixed = self.decoding
        if fixed is not None:
            fixed.select_rows(beam_idx)
        else:
            self._growing.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse(f"has {self.sizes.batch} rows for its life; repeat the prompt instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse(f"has {self.sizes.batch} rows for its life; reorder_cache keeps their number")

    def activate_past_recording(self) -> None:
        self._refuse(
            "cannot take tokens back, as assisted decoding does; generate without assistant_model "
            "and prompt_lookup_num_tokens"
        )

    def crop(self, max_length: int) -> None:
        self._refuse("cannot take tokens back")

    def _refuse(self, reason: str) -> NoReturn:
        raise KVCompressError(f"the static cache {reason}, or use the growing CompressedCache")

    def reset(self) -> None:
        """Empty; the arrays and their addresses stay."""
        self._growing.reset()
        self.is_initialized = self._announced = self.frozen = False

    def nbytes(self) -> int:
        """Bytes of the arrays; none before the first prompt."""
        return 0 if self.fixed is None else self.fixed.nbytes()


class _StepClasses:
    """Class flags of the token that the next step brings, for every layer.

    Attributes:
        table: ``[largest class token id + 2]`` uint8 flags by token id, its last entry for all
            larger ids.
        ids: ``[B, 1]`` ids of the step, None where they are unknown (`inputs_embeds`).
    """

    def __init__(self, plan: Plan) -> None:
        largest = max((0, *plan.special_ids, *plan.punct_ids))
        self.table = torch.zeros(largest + 2, dtype=torch.uint8)
        self.table[list(plan.special_ids)] |= SPECIAL_FLAG
        self.table[list(plan.punct_ids)] |= PUNCT_FLAG
        self.ids: Tensor | None = None

    def move(self, device: torch.device) -> None:
        self.table = self.table.to(device)
        torch._dynamo.mark_static_address(self.table)

    def flags(self) -> Tensor | None:
        """``[B]`` uint8."""
        if self.ids is None:
            return None
        return self.table[self.ids[:, 0].clamp(max=self.table.shape[0] - 1)]


class StaticCompressedCache(CompressedCache):
    """A `CompressedCache` whose arrays are allocated once; pass it as `cache`.

    The first prompt allocates the arrays, for good: `reset` and further prompts leave them where
    they are. Caches made with the same plan and numbers share one compiled graph. A head that
    keeps special tokens or punctuation without a `cap` gets a slot for every token.

    What lies beyond `max_tokens` is refused where Python sees it: before a prompt, and before a
    step whose pre-hook runs uncompiled. A compiled graph cannot raise; past `max_tokens` it drops
    the oldest tokens of full heads, so bound the loop, by `room` or otherwise.

    Args:
        plan, params, protect: as for `CompressedCache`.
        batch: rows, beams included.
        max_tokens: of one row, the prompt with its padding and all new tokens.
        prompt_tokens: of the longest prompt with its padding, all turns together; ratio budgets
            get room for it. None is `max_tokens`.
        kernels: ``auto`` decodes by the Triton kernels on a CUDA device that can run them, by torch
            elsewhere; ``triton`` and ``torch`` want the one or the other.

    Raises:
        KVCompressError: for a plan with relative positions or turn quotas, or a model whose layers
            share keys or keep something else.
    """

    def __init__(
        self,
        plan: Plan,
        params: KVParams | None = None,
        *,
        batch: int,
        max_tokens: int,
        prompt_tokens: int | None = None,
        protect: Sequence[Span] | Sequence[Sequence[Span]] = (),
        kernels: Kernels = "auto",
    ) -> None:
        if kernels not in get_args(Kernels):
            raise ValueError(f"kernels={kernels!r}: give one of {', '.join(get_args(Kernels))}")
        sizes = Sizes(batch, max_tokens, max_tokens if prompt_tokens is None else prompt_tokens)
        if not (batch >= 1 and 1 <= sizes.prompt_tokens <= max_tokens < MOST_TOKENS):
            raise ValueError(f"{sizes}: give batch ≥ 1 and 1 ≤ prompt_tokens ≤ max_tokens < 2^31")
        _refuse_plan(plan)
        super().__init__(plan, params, protect=protect)
        self.sizes = sizes
        self.prompts = 0  # forwards that were no decode step
        self.checks_steps = True  # False while the caller counts the steps itself
        self._step_classes = _StepClasses(plan)
        self.layers = [
            StaticCompressedLayer(layer.settings, layer.spans, sizes, self._step_classes, kernels)
            for layer in self.compressed_layers
        ]

    @property
    def static_layers(self) -> list[StaticCompressedLayer]:
        return cast(list[StaticCompressedLayer], self.layers)

    def note_forward(
        self,
        input_ids: Tensor | None,
        length: int,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> None:
        first = self.static_layers[0]
        if first.frozen and length == 1:
            if self.checks_steps and not torch.compiler.is_compiling():
                self._check_step()
            self._step_classes.ids = input_ids
            for layer in self.static_layers:
                layer.announce(_STEP)
            return
        if not torch.compiler.is_compiling():
            first.check_prompt(None if input_ids is None else input_ids.shape[0], length)
            self.prompts += 1
            for layer in self.static_layers:
                layer.thaw()
            super().note_forward(input_ids, length, attention_mask, logits_to_keep)

    def _check_step(self) -> None:
        """Refuse a step beyond `max_tokens`, and warn beyond `max_position`."""
        total = int(self.get_seq_length()) + 1
        self.check_length(total)
        fixed = self.static_layers[0].fixed
        if total > self.plan.max_position and fixed is not None:
            self.check_reach(int(fixed.row_seen.max()) + 1)

    def check_reach(self, tokens: int) -> None:
        """Warn once where the longest row has more real tokens than the plan's `max_position`."""
        if tokens > self.plan.max_position:
            self._check_position(1, None)

    def check_length(self, total_tokens: int) -> None:
        """Refuse what would bring more than `max_tokens` tokens in all."""
        if total_tokens > self.sizes.max_tokens:
            raise KVCompressError(
                f"{total_tokens} tokens of prompt and answer do not fit the static cache, which is "
                f"for max_tokens={self.sizes.max_tokens}; make a larger one or generate less"
            )

    def room(self) -> int:
        """Tokens that still fit; waits for the device."""
        return self.sizes.max_tokens - int(self.get_seq_length())


def _refuse_plan(plan: Plan) -> None:
    kinds = {plan.model.kind(layer) for layer in range(plan.model.layers)} - _SERVED
    shared = any(len(plan.model.readers(layer)) > 1 for layer in range(plan.model.layers))
    reasons = {
        f"{', '.join(sorted(kinds))} layers": bool(kinds),
        "layers that share keys": shared,
        "relative positions": plan.positions != "original",
        "turn quotas (turn_tokens)": plan.turn_tokens > 0,
        "decisions per request (per_request)": plan.per_request is not None,
        f"the scorer {plan.scorer!r}": not scorer(plan.scorer).adds_up,
        "a recall tier": plan.recall is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise KVCompressError(
                f"the static cache does not serve {reason}; use the growing CompressedCache"
            )
