"""The compressed KV cache, as transformers' `generate` uses it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kvcompress.errors import KVCompressError, PositionRangeWarning
from kvcompress.evict.scorers import scorer
from kvcompress.plan import HOLDS_KV, HeadPlan, Plan, PooledBudget
from kvcompress.quant.keystats import KVParams, Rotation
from kvcompress.runtime.cache.second_reading import SecondReading
from kvcompress.runtime.cache.seen_text import SeenText
from kvcompress.runtime.cache.spans import ClassIds, Span, row_spans
from kvcompress.runtime.layer.call import ForwardInfo, refuse_change
from kvcompress.runtime.layer.latent import latent_layer
from kvcompress.runtime.layer.layer import AbstractLayer, CompressedLayer
from kvcompress.runtime.layer.relative import check_relative, frame_positions, row_starts
from kvcompress.runtime.model.attached import own_part
from kvcompress.runtime.model.parallel import layer_devices
from kvcompress.runtime.names import cropped_tokens
from kvcompress.runtime.prompt.choose import pooled_over_layers
from kvcompress.runtime.recall.layer import RecallReady, recall_layer
from kvcompress.runtime.saved.cachefile import CacheFileError
from kvcompress.runtime.saved.persist import load_cache, save_cache
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.runtime.torch_modes import between_graphs, leaving_plain_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Compress = Literal["per_chunk", "after_prefill"]


class CompressedCache(Cache):
    """A KV cache that follows a plan; pass it as `cache`, or let `generate` make it.

    Args:
        plan: of this very model; see `kvcompress.attach`.
        params: key centre and scale; None is centre 0 and scale 1.
        config: the model's configuration, needed where some layers keep something other than keys
            and values, as linear attention does. `kvcompress.new_cache(model)` passes it.
        protect: half-open ranges of tokens that are never evicted, numbered from a row's first
            real token; one list for every row, or a list of such lists, one per row.
        compress: ``per_chunk`` evicts after every forward, so that a long prompt that is fed in
            chunks never holds more than one chunk uncompressed; ``after_prefill`` holds the whole
            prompt until it ends, and then equals a prompt that is fed at once.

    Raises:
        KVCompressError: for spans that overlap or are empty.
        PlanError: for relative positions that can outgrow the plan's `max_position`.
    """

    filled_by: weakref.ref[PreTrainedModel] | None = None  # the model of the newest forward

    def __init__(
        self,
        plan: Plan,
        params: KVParams | None = None,
        config: PretrainedConfig | None = None,
        protect: Sequence[Span] | Sequence[Sequence[Span]] = (),
        compress: Compress = "per_chunk",
    ) -> None:
        if compress not in ("per_chunk", "after_prefill"):
            raise KVCompressError(f"compress={compress!r}: give per_chunk or after_prefill")
        self.plan = plan
        self.compress = compress
        spans = row_spans(protect)
        if plan.positions == "relative":
            _check_relative(plan, spans, compress)
        own = [] if config is None else DynamicCache(config=config).layers
        layers: list[Any] = []
        for layer in range(plan.model.layers):
            if plan.model.kind(layer) in HOLDS_KV:
                settings = LayerSettings(plan, params, layer)
                kind = latent_layer if settings.kind == "latent" else CompressedLayer
                kind = recall_layer if plan.recalls(layer) else kind
                layers.append(kind(settings, spans, compress == "after_prefill"))
            elif config is None:
                raise KVCompressError(
                    f"layer {layer} ({plan.model.kind(layer)}) stores no keys of its own; make "
                    "the cache with kvcompress.new_cache(model)"
                )
            elif layer < len(own):
                layers.append(own[layer])
        super().__init__(layers=layers)
        plain = all(isinstance(layer, AbstractLayer) for layer in layers)
        self._config = None if plain else config
        self.params = params
        self.seen_text = SeenText()
        self._class_ids = ClassIds(plan)
        self._warned: set[type[Warning]] = set()
        self._in_prompt = False
        self._second_reading = SecondReading(plan)
        self.needs_rotations = "rotation" in scorer(plan.scorer).needs
        # in an assistant's cache `generate` may take back one token more than were drafted
        self.assists = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "filled_by": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Unpickled in inference mode, tensors could not be changed outside of it."""
        self.__dict__.update(state)
        if torch.is_inference_mode_enabled():
            self.__dict__.update(deepcopy(self).__dict__)

    @leaving_plain_tensors
    def __deepcopy__(self, memo: dict[int, object]) -> CompressedCache:
        memo[id(self.plan)] = self.plan
        memo[id(self.params)] = self.params
        memo[id(self._config)] = self._config
        memo[id(self._class_ids)] = self._class_ids
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copied

    @property
    def compressed_layers(self) -> list[AbstractLayer]:
        """The layers that hold keys and values, in order."""
        return [layer for layer in self.layers if isinstance(layer, AbstractLayer)]

    # ---- told by the model's forward
    @between_graphs
    def note_forward(
        self,
        input_ids: Tensor | None,
        length: int,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> None:
        """Tell every layer of the forward that comes.

        Args:
            input_ids: ``[B, T]``, None where the caller passes embeddings.
            length: T.
            attention_mask: ``[B, seen + T]``, or None.
            logits_to_keep: how many logits the caller wants; while the cache records drafts, all
                but the first of them belong to drafted tokens.
        """
        uses = any(layer.settings.uses_classes for layer in self.compressed_layers)
        if uses and input_ids is None and length > 1:
            self._warn(
                UserWarning,
                "the plan keeps special tokens or punctuation, which embeddings do not show: "
                "pass input_ids, or these classes are not kept",
            )
        if self._second_reading.reading:
            self._announce(ForwardInfo(in_prompt=True, length=length, reads_again=True))
            return
        if length == 1 and not self._in_prompt and not self._drafts_wait:
            self.end_prefill()
        final_tokens = None if not logits_to_keep else max(0, length - logits_to_keep + 1)
        if self.assists and final_tokens:
            final_tokens -= 1
        self._check_rows(input_ids)
        self._check_mask(length, attention_mask)
        self._check_position(length, attention_mask)
        flags = self._class_ids.flags(input_ids) if uses and input_ids is not None else None
        self._announce(ForwardInfo(flags, final_tokens, self._in_prompt, length))
        self.seen_text.update(input_ids)
        if self._second_reading.wanted:
            self._second_reading.note(input_ids, length, attention_mask)

    def _announce(self, forward_info: ForwardInfo) -> None:
        for layer in self.compressed_layers:
            layer.announce(forward_info)

    @between_graphs
    def relative_positions(
        self,
        rotations: Sequence[Rotation | None],
        batch: int,
        length: int,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Position ids ``[B, T]`` of the next forward under a plan with relative positions.

        Args:
            rotations: of every layer, see `serving_rotations`.
            attention_mask: ``[B, seen + T]``, or None.
        """
        for layer in self.compressed_layers:
            layer.settings.rotation = rotations[layer.settings.layer]
        first = self.compressed_layers[0]
        known = None if first.state is None else first.state.start
        start = row_starts(known, attention_mask, first.seen, batch)
        return frame_positions(self.plan, start, first.seen, length)

    def _check_rows(self, input_ids: Tensor | None) -> None:
        held = self.compressed_layers[0].row_seen
        if held is not None and input_ids is not None and len(held) != input_ids.shape[0]:
            refuse_change("rows", len(held), input_ids.shape[0])

    def _check_mask(self, length: int, mask: Tensor | None) -> None:
        """A mask must show the stored tokens as it did when they came."""
        first = self.compressed_layers[0]
        if mask is None or mask.ndim != 2 or length < 2 or first.row_seen is None:
            return
        if first.has_pending:
            return
        if mask.shape[1] != first.seen + length:
            return
        shown = mask[:, : first.seen].ne(0).sum(1).tolist()
        if shown != first.row_seen:
            raise KVCompressError(
                f"the attention mask shows {shown} of the tokens so far, the cache took in "
                f"{first.row_seen}: it cannot hide or show tokens later; pass the mask of "
                "the whole conversation"
            )

    def _check_position(self, length: int, mask: Tensor | None) -> None:
        last = self.get_seq_length() + length
        limit = self.plan.max_position
        if last <= limit or self.plan.positions == "relative":
            return
        if mask is not None and mask.ndim == 2 and mask.shape[1] == last:
            last = int(mask.ne(0).sum(1).max())
        if last > limit:
            self._warn(
                PositionRangeWarning,
                f"position {last - 1} is beyond {limit - 1}, the last for which the plan's key "
                f"constants were derived (max_position {limit}): codes may lose precision; "
                "profile with a larger max_position",
            )

    def _warn(self, category: type[Warning], text: str) -> None:
        """Once per cache and category."""
        if category not in self._warned:
            self._warned.add(category)
            warnings.warn(text, category, stacklevel=2)

    # ---- prompts in parts
    def begin_prefill(self) -> None:
        """The forwards until `end_prefill` are parts of one prompt, whatever their length."""
        self._in_prompt = True

    def finish_prompt(self, model: PreTrainedModel) -> None:
        """`end_prefill`, after the model has read the prompt again where the plan's scorer wants
        that (KVzip). `generate` calls it by itself; call it where forwards are made by hand.

        Raises:
            KVCompressError: where the prompt came as embeddings, which cannot be repeated.
        """
        if self._second_reading.wanted and any(
            layer.has_pending for layer in self.compressed_layers
        ):
            self._second_reading.read_again(model, self)
        self.end_prefill()

    @leaving_plain_tensors
    def end_prefill(self) -> None:
        """The prompt is complete: compress what is held of it.

        Raises:
            KVCompressError: where the plan's scorer wants the prompt to be read again first.
        """
        self._in_prompt = False
        pending = [layer for layer in self.compressed_layers if layer.has_pending]
        if not pending:
            return
        self._second_reading.check_done()
        rule = self.plan.per_request
        if isinstance(rule, PooledBudget) and rule.scope == "model":
            prompts = [layer.prompt_to_store() for layer in pending]
            ready = [prompt for prompt in prompts if prompt is not None]
            states = [prompt.state for prompt in ready]
            granted = pooled_over_layers(states, [prompt.candidates for prompt in ready])
            for prompt, own in zip(ready, granted, strict=True):
                prompt.finish(own)
            return
        for layer in pending:
            layer.end_prefill()

    @property
    def _drafts_wait(self) -> bool:
        return any(layer.drafts_wait for layer in self.compressed_layers)

    # ---- which tokens they are
    def check_prefix(self, input_ids: Tensor) -> None:
        """Refuse `input_ids` ``[B, T]`` that do not start with the tokens that the cache has seen.

        Raises:
            KVCompressError: naming the first row that differs.
        """
        self.seen_text.check(input_ids, int(self.get_seq_length()))

    def chosen_heads(self) -> list[list[tuple[HeadPlan, ...]]]:
        """``[layer][row]`` heads as the plan's rule for each request chose them; the plan's own
        where it has none, or before a prompt has ended."""
        return [
            [
                tuple(layer.state.head(row, h) for h in range(len(layer.settings.heads)))
                for row in range(layer.state.batch)
            ]
            for layer in self.compressed_layers
            if layer.state is not None
        ]

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        self.seen_text.crop(cropped_tokens(max_length))

    def reset(self) -> None:
        """Empty, for any batch: transformers' own layers would keep the size of theirs."""
        super().reset()
        if self._config is not None:
            own = DynamicCache(config=self._config).layers
            for number, layer in enumerate(self.layers):
                if not isinstance(layer, AbstractLayer):
                    self.layers[number] = own[number]
        self.seen_text = SeenText()
        self._second_reading = SecondReading(self.plan)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._settle()
        super().reorder_cache(beam_idx)
        self.seen_text.select_rows(beam_idx.tolist())

    def _settle(self) -> None:
        """Compress the prompt that is held before rows move."""
        if any(layer.has_pending for layer in self.compressed_layers) and not self._drafts_wait:
            self.end_prefill()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._settle()
        super().batch_repeat_interleave(repeats)
        rows = range(len(self.seen_text.rows or ()))
        self.seen_text.select_rows([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._settle()
        super().batch_select_indices(indices)
        rows = torch.arange(len(self.seen_text.rows or ()))
        if len(rows):
            self.seen_text.select_rows(rows[indices.cpu()].tolist())

    # ---- in a file
    def save(self, path: Path | str) -> None:
        """Write the cache to a file, see `kvcompress.runtime.saved.persist.save_cache`."""
        if type(self) is not CompressedCache:
            raise CacheFileError(f"a {type(self).__name__} cannot be saved; use a CompressedCache")
        save_cache(self, path)

    @classmethod
    def load(cls, path: Path | str, model: PreTrainedModel) -> CompressedCache:
        """A saved cache, for a model that has the same plan attached.

        Raises:
            KVCompressError: where no plan is attached, or the file is damaged or of another model,
                plan, key constants, dtype or weights, adapters in use included.
        """
        plan, params = own_part(model)
        return load_cache(cls, path, plan, params, model=model, device=layer_devices(model))

    def nbytes(self) -> int:
        """Bytes of every tensor of the compressed layers, metadata included."""
        return sum(layer.nbytes() for layer in self.compressed_layers)

    def host_nbytes(self) -> int:
        """Bytes of host memory that a plan's recall tier holds beside them."""
        tiers = (layer.growing.ready for layer in self.compressed_layers)
        return sum(tier.host_nbytes() for tier in tiers if isinstance(tier, RecallReady))


def _check_relative(
    plan: Plan, spans: tuple[range, ...] | list[tuple[range, ...]], compress: Compress
) -> None:
    rows = spans if isinstance(spans, list) else [spans]
    check_relative(plan, max(sum(map(len, row)) for row in rows))
    if compress != "per_chunk":
        raise KVCompressError(
            "relative positions cannot hold a prompt, which may be longer than max_position; use "
            "compress='per_chunk'"
        )
