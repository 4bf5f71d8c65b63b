"""Decoding with a `StaticCompressedCache` as one CUDA graph, replayed for every token.

    cache = kvcompress.StaticCompressedCache(plan, params, batch=1, max_tokens=32768)
    logits = model(**prompt, cache=cache).logits[:, -1]
    decode = DecodeGraph(model, cache)
    while not done:
        logits = decode(logits.argmax(-1, keepdim=True))

A replay launches the step as a whole: the host neither waits nor allocates, and what chooses the
next token (greedy, sampling) stays outside. The cache's arrays never move, so one graph serves
every further prompt on the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache
from kvcompress.runtime.static.state import StaticState

_WARM_UP: Final = 2  # steps that compile kernels and settle the allocator before the capture


class DecodeGraph:
    """One decode step, captured at the third call; the first two run eagerly and count as well.

    Args:
        model: with a plan attached, on the device of the cache.
        cache: that holds a prompt.
        step: what runs a forward in place of `model`, for example
            ``torch.compile(model, fullgraph=True)``, whose fused graph is then captured.
        capture: False runs every step eagerly, on any device, by the same code.

    Raises:
        KVCompressError: where no graph can be captured, with the reason.
    """

    def __init__(
        self,
        model: Any,
        cache: StaticCompressedCache,
        step: Callable[..., Any] | None = None,
        capture: bool = True,
    ) -> None:
        fixed = _arrays_of(model, cache, capture)
        self.cache, self.capture = cache, capture
        self._step: Callable[..., Any] = model if step is None else step
        self._row_seen = fixed.row_seen
        self._ids = torch.zeros(fixed.batch, 1, dtype=torch.int64, device=fixed.start.device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._prompts = -1
        self._total = self._longest = 0

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits ``[B, vocab]`` after one token per row.

        Args:
            ids: ``[B, 1]`` int64; on the cache's device, or the copy waits for the device.

        Returns:
            What the graph overwrites at the next call: clone what must outlive it.

        Raises:
            KVCompressError: past the cache's `max_tokens`.
        """
        if ids.shape != self._ids.shape:
            raise KVCompressError(f"ids {tuple(ids.shape)}: give {tuple(self._ids.shape)}")
        self._count()
        self._ids.copy_(ids)
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif not self.capture:
            self._logits = self._run()
        elif self._calls <= _WARM_UP:
            self._logits = self._warm_up()
        else:
            self._graph = self._captured()
            self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _count(self) -> None:
        """Check on the host what the step brings; asks the device once after each prompt."""
        cache = self.cache
        if not cache.static_layers[0].frozen:
            raise KVCompressError("the cache holds no prompt: run one through the model first")
        if cache.prompts != self._prompts:
            self._prompts, self._total = cache.prompts, int(cache.get_seq_length())
            self._longest = int(self._row_seen.max())
        cache.check_length(self._total + 1)
        self._total, self._longest = self._total + 1, self._longest + 1
        cache.check_reach(self._longest)

    def _run(self) -> Tensor:
        """The forward; positions are each row's number of real tokens."""
        self.cache.checks_steps = False
        try:
            out = self._step(
                input_ids=self._ids,
                position_ids=self._row_seen[:, None].long(),
                **as_argument(self.cache),
                use_cache=True,
            )
        finally:
            self.cache.checks_steps = True
        logits: Tensor = out.logits[:, -1]
        return logits

    def _warm_up(self) -> Tensor:
        """As the capture will run, on a stream of its own."""
        here = torch.cuda.current_stream(self._ids.device)
        aside = torch.cuda.Stream(self._ids.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            logits = self._run()
        here.wait_stream(aside)
        logits.record_stream(here)
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._logits = self._run()
        except RuntimeError as error:
            raise KVCompressError(
                f"a decode step cannot be captured: {str(error).splitlines()[0]} (the model, or "
                "what is hooked into it, asks the device for a value; give capture=False)"
            ) from error
        return graph


def _refuse(reason: str) -> NoReturn:
    raise KVCompressError(f"a decode step cannot be captured: {reason}")


def _arrays_of(model: Any, cache: Any, capture: bool) -> StaticState:
    """The first layer's arrays, of a cache whose step can be captured."""
    if not isinstance(cache, StaticCompressedCache):
        _refuse(f"{type(cache).__name__} moves its tensors; make a StaticCompressedCache")
    fixed = cache.static_layers[0].decoding
    if fixed is None:
        _refuse("the cache holds no prompt: run one through the model first")
    device = fixed.start.device
    if capture and device.type != "cuda":
        _refuse(f"CUDA graphs need a CUDA device, the cache lies on {device}; give capture=False")
    if len({layer.fixed.start.device for layer in cache.static_layers if layer.fixed}) > 1:
        _refuse("the layers lie on several devices")
    if getattr(model, "training", False):
        _refuse("the model is in training mode; call model.eval()")
    return fixed
