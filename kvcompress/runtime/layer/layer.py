"""A layer of the compressed cache as transformers sees it; `ready` has the work on tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.runtime.layer.attention import Pair, SegmentAttention
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo, Progress, refuse_change
from kvcompress.runtime.layer.ready import AbstractReady, Ready, refuse_crop
from kvcompress.runtime.names import CACHE, cropped_tokens, release
from kvcompress.runtime.prompt.store_prompt import PromptToStore
from kvcompress.runtime.store.state import LayerSettings, LayerState
from kvcompress.runtime.torch_modes import between_graphs, leaving_plain_tensors

# protected tokens of every row, or of each row
Spans = list[tuple[range, ...]] | tuple[range, ...]


class AbstractLayer(CacheLayerMixin):
    """What the cache, its files and the attention function ask of a layer.

    Attributes:
        spans: one tuple of protected tokens for every row, or a list of them, one per row.
    """

    supports_early_init = False

    def __init__(self, settings: LayerSettings, spans: Spans) -> None:
        super().__init__()
        self.settings, self.spans = settings, spans
        self.forward_info = ForwardInfo()  # of the forward that was announced last
        self._announced = False

    # ---- the handshake with the model's pre-hook
    def announce(self, forward_info: ForwardInfo) -> None:
        """The next call of `update` belongs to this forward."""
        self.forward_info, self._announced = forward_info, True

    def _answer(self, length: int) -> ForwardInfo:
        """What was announced of the `length` tokens that come now.

        Raises:
            KVCompressError: where the cache was not told of them, or was told otherwise, naming the
                release and how the cache has to be passed.
        """
        announced, self._announced = self._announced, False
        if not announced or self.forward_info.length not in (0, length):
            was = f"announced with {self.forward_info.length}" if announced else "not announced"
            raise KVCompressError(
                f"layer {self.settings.layer}: a forward of {length} tokens was {was} to its cache "
                f"({release()}): call kvcompress.attach(model, plan) first, then the model itself, "
                f"no part of it, with the cache as {CACHE}="
            )
        return self.forward_info

    @abstractmethod
    def forward(self, call: AttentionCall) -> Tensor:
        """Attention of the chunk that `update` saw last, then eviction and storage.

        Returns:
            ``[B, T, Hq, D]`` contiguous.
        """

    @property
    @abstractmethod
    def growing(self) -> CompressedLayer:
        """The layer that takes prompts in."""

    @property
    def seen(self) -> int:
        """Tokens seen, kept or not, pads counted."""
        return self.growing.progress.seen

    @property
    def state(self) -> LayerState | None:
        """What a layer holds in segments; None before its first keys."""
        ready = self.growing.ready
        return ready.state if isinstance(ready, Ready) else None

    @property
    def row_seen(self) -> list[int] | None:
        """Real tokens of each row so far; None before the first keys."""
        ready = self.growing.ready
        return None if ready is None else ready.row_seen

    @property
    def has_pending(self) -> bool:
        """Whether a prompt, or a draft, is held uncompressed."""
        ready = self.growing.ready
        return ready is not None and ready.has_pending

    @property
    def drafts_wait(self) -> bool:
        """Whether tokens that come now may be a draft that is stored only when `crop` is called."""
        growing = self.growing
        recording = growing.progress.record_past
        return recording and growing.ready is not None and growing.ready.drafts_wait

    def prompt_to_store(self) -> PromptToStore | None:
        """The held prompt, ready to be compressed; None where none is held."""
        ready = self.growing.ready
        return None if ready is None else ready.prompt_to_store()

    def end_prefill(self) -> None:
        """Compress a prompt that is held."""
        if self.growing.ready is not None:
            self.growing.ready.end_prefill()

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""

    def offload(self) -> None:
        raise KVCompressError("the compressed cache cannot be offloaded; drop offloading=True")

    prefetch = offload


# from settings, keys and values of the first chunk, spans of each row, hold_prompt and progress
Begin = Callable[
    [LayerSettings, Pair, list[tuple[range, ...]], bool, Progress],
    AbstractReady,
]


def in_segments(
    settings: LayerSettings,
    first: Pair,
    spans: list[tuple[range, ...]],
    hold_prompt: bool,
    progress: Progress,
) -> Ready:
    """A layer whose keys are stored in segments as the model makes them."""
    state = LayerState.empty(settings, *first, spans)
    return Ready(state, hold_prompt, progress, SegmentAttention())


@final
class CompressedLayer(AbstractLayer):
    """A layer whose store grows with the context. `update` hands the chunk through, and `forward`
    attends and stores it.

    Args:
        spans: see `AbstractLayer`.
        hold_prompt: keep a prompt uncompressed until it ends, see `CompressedCache`.
        begin: makes what works on tokens, when the first keys come.

    Attributes:
        ready: None before the first keys.
    """

    is_compileable = False

    def __init__(
        self,
        settings: LayerSettings,
        spans: Spans = (),
        hold_prompt: bool = False,
        begin: Begin = in_segments,
    ) -> None:
        super().__init__(settings, spans)
        self.sliding_window = settings.window if settings.block is None else settings.block
        self.is_sliding = self.sliding_window is not None
        self.hold_prompt = hold_prompt
        self.progress = Progress()
        self.ready: AbstractReady | None = None
        self._begin = begin
        # the keys and values that `update` handed on, until they are read
        self._given: Pair | None = None

    @property
    def growing(self) -> CompressedLayer:
        return self

    # ---- what transformers calls
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take tokens back; transformers 5.24 asks before it drafts."""
        return self.progress.record_past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.begin(key_states, value_states)

    @leaving_plain_tensors
    def begin(self, key: Tensor, value: Tensor, spans: Spans | None = None) -> AbstractReady:
        """Get ready for keys and values like these.

        Args:
            spans: in place of the layer's own, where rows have moved since they were given.

        Raises:
            UnsupportedModelError: where the plan is for other shapes.
        """
        settings, shape, heads = self.settings, self.settings.plan.model, len(self.settings.heads)
        for name, came, dim in (("keys", key, shape.head_dim), ("values", value, shape.v_dim)):
            if came.shape[1] != heads or came.shape[-1] != dim:
                raise UnsupportedModelError(
                    f"layer {settings.layer}: {name} {tuple(came.shape)}, the plan is for {heads} "
                    f"KV heads of {dim} channels; use this model's own plan"
                )
        self.dtype, self.device, batch = key.dtype, key.device, key.shape[0]
        spans = self.spans if spans is None else spans
        rows = spans if isinstance(spans, list) else [tuple(spans)] * batch
        if len(rows) != batch:
            raise KVCompressError(
                f"protect names the tokens of {len(rows)} rows, the batch has {batch}"
            )
        self.ready = self._begin(settings, (key, value), rows, self.hold_prompt, self.progress)
        self.keys = self.values = key.new_zeros(0)
        self.is_initialized = True
        return self.ready

    @between_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        info = self._answer(key_states.shape[-2])
        ready = self.ready
        if ready is None:
            ready = self.begin(key_states, value_states)
        else:
            self._check_fits(key_states, len(ready.row_seen))
        if self._given is not None or ready.awaits_readers:
            self._refuse_unread()
        self._given = (key_states, value_states)
        self.progress.seen += key_states.shape[-2]
        key_states._kvc_layer = self  # type: ignore[attr-defined]  # how the attention finds its layer
        return ready.shown(key_states, value_states, info)

    def resume(self, state: LayerState, seen: int) -> None:
        """Go on with a state that was filled elsewhere."""
        self.progress.seen = seen
        self.ready = Ready(state, self.hold_prompt, self.progress, SegmentAttention())

    def _check_fits(self, key: Tensor, batch: int) -> None:
        """Refuse another batch, dtype or device than that of the tokens held."""
        if (batch, self.dtype, self.device) != (key.shape[0], key.dtype, key.device):
            refuse_change("rows", batch, key.shape[0])
            refuse_change("dtype", self.dtype, key.dtype)
            refuse_change("device", self.device, key.device)

    def _refuse_unread(self) -> None:
        settings = self.settings
        if self._given is None:
            raise UnsupportedModelError(
                f"layer {settings.layer}: layers {settings.readers[1:]} should have read its keys "
                "and did not"
            )
        raise UnsupportedModelError(
            f"layer {settings.layer}: the model stored keys but never called the compressed "
            "attention, so its output would be wrong; call kvcompress.attach(model, plan) first"
        )

    def get_seq_length(self) -> int:
        """Positions and masks follow it."""
        return self.progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the chunk: stored tokens are masked from their own positions."""
        return query_length, self.progress.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        return -1 if self.ready is None else len(self.ready.row_seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.ready is not None:
            self.ready.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ready is not None:
            self.ready.select_rows([r for r in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.ready is not None:
            self.ready.select_rows(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def reset(self) -> None:
        recording = self.progress.record_past
        self.progress, self.ready = Progress(record_past=recording), None
        self.is_initialized, self._given = False, None
        self._announced = False

    def activate_past_recording(self) -> None:
        """From now on drafted tokens can be taken back with `crop`."""
        self.progress.record_past = True

    def crop(self, max_length: int) -> None:
        """Take back the newest ``−max_length`` tokens; 0 says that all drafted tokens stay.

        Raises:
            KVCompressError: for tokens that were not drafted while the cache recorded.
        """
        count = cropped_tokens(max_length)
        if self.ready is None:
            refuse_crop(-count, 0)
        else:
            self.ready.crop(-count)
        self.progress.seen -= count

    # ---- attention
    @between_graphs
    def forward(self, call: AttentionCall) -> Tensor:
        ready, settings = self.ready, self.settings
        if call.reader is not None and call.reader != settings.layer and ready is not None:
            return ready.read_shared(call, self.forward_info)
        given, self._given = self._given, None
        if given is None or ready is None:
            raise UnsupportedModelError(
                f"layer {settings.layer}: the model attends more than once over what it stored, "
                "which the compressed cache cannot serve"
            )
        return ready.forward(call, given, self.forward_info)

    def check_idle(self) -> None:
        """Refuse to be copied to a file while anything waits to be stored or taken back.

        Raises:
            KVCompressError: saying what has to happen first.
        """
        reason = None if self.ready is None else self.ready.refuses_saving()
        if self._given is not None:
            reason = "save the cache between two forwards, not inside one"
        if reason is not None:
            raise KVCompressError(f"layer {self.settings.layer}: {reason}")

    def nbytes(self) -> int:
        return 0 if self.ready is None else self.ready.nbytes()
