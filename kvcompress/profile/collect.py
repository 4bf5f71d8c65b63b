"""Run prompts through a model, one forward each, and hand every layer's attention to an observer.

Queries are taken in chunks of at most 128 rows, so memory is O(Hq · 128 · S) for one layer at a
time and no [Hq, S, S] matrix ever exists. What an observer keeps has to be small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from kvcompress.evict.finish import finished, output_weight
from kvcompress.evict.score_queries import pair_weight
from kvcompress.evict.scorers import Rows, Tokens, scorer
from kvcompress.plan import ModelShape
from kvcompress.profile.hf import attention_through, decoder_layers
from kvcompress.profile.rows import held_out_rows
from kvcompress.quant.keystats import Rotation
from kvcompress.recipe import Keep

CHUNK_ROWS: Final = 128
BLOCK_ROWS: Final = 8  # held-out rows that share one keep-set


@dataclass(frozen=True, slots=True)
class Softmax:
    """How a layer turns queries and keys into attention.

    Attributes:
        window: newest keys that a query sees, itself included; None is all of them.
    """

    scaling: float
    softcap: float | None
    window: int | None

    def visible(self, first_row: int, rows: int, keys: int, device: torch.device) -> Tensor:
        """``[rows, keys]`` bool."""
        q = torch.arange(first_row, first_row + rows, device=device)[:, None]
        k = torch.arange(keys, device=device)[None, :]
        seen = k <= q
        return seen if self.window is None else seen & (k > q - self.window)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Unmasked ``[Hkv, G, T, S]`` from ``[Hkv, G, T, D]`` and ``[Hkv, S, D]``, float32."""
        flat = query.flatten(1, 2) @ key.mT * self.scaling
        if self.softcap is not None:
            flat = torch.tanh(flat / self.softcap) * self.softcap
        return flat.unflatten(1, query.shape[1:3])


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One layer on one prompt: its held-out rows and what the earlier rows say of each token.

    Attributes:
        module: the attention module.
        query: ``[Hkv, G, W, D]`` float32, the prompt's last W rows.
        key, value: ``[Hkv, S, D]`` float32.
        output: ``[Hkv, G, W, Dv]`` exact attention output of those rows.
        prompt_tokens: S − W, the first held-out row.
        ranks: ``[W / 8, Hkv, S]``, rank of each token before every eighth held-out row, from the
            rows before it alone; larger is kept, unseen tokens are −inf.
        residual: ``[W, hidden]`` float32, the residual stream where the layer reads it.
    """

    layer: int
    module: nn.Module
    softmax: Softmax
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    prompt_tokens: int
    ranks: Tensor
    residual: Tensor


class ColumnSums:
    """Scores of a layer's tokens, raised row by row, ``[Hkv, S]``; a rank only knows earlier rows.

    Args:
        query, key, value: ``[Hkv, G, S, D]`` and ``[Hkv, S, D]``.
        prompt_tokens: rows of the prompt proper; `keep.score_rows` counts back from there.
        module: the attention module.
        tensors: what was trained for the scorer, of this layer.
        hidden: ``[S, hidden]`` input of the attention module, for a scorer that needs it.
    """

    def __init__(
        self,
        keep: Keep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_tokens: int,
        *,
        module: nn.Module,
        scaling: float,
        rotation: Rotation | None = None,
        tensors: dict[str, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        self.keep, self.scorer = keep, scorer(keep.scorer)
        self.prompt_tokens = prompt_tokens
        last = 0 if keep.score_rows is None else max(0, prompt_tokens - keep.score_rows)
        self.first_last = last  # of the prompt's rows that vote for all that they see
        self.first_vote = last if keep.score_stride is None else 0
        heads, tokens, _ = key.shape
        self.snapshots_at = range(prompt_tokens, tokens, BLOCK_ROWS)
        self.position = torch.arange(tokens, device=key.device).expand(heads, tokens)
        needs = self.scorer.needs
        split = None
        if "output_weight" in needs:
            split = output_weight(module, heads, query.shape[1] * value.shape[-1])
        self.tokens = Tokens(
            layer=int(getattr(module, "layer_idx", 0)),
            head=torch.arange(heads, device=key.device),
            key=key[None],
            value=value[None],
            position=self.position[0],
            valid=torch.ones(1, tokens, dtype=torch.bool, device=key.device),
            query=query[None, :, :, :0],
            scaling=scaling,
            output_weight=split,
            hidden=None if hidden is None else hidden[None],
            rotation=rotation,
            tensors=tensors or {},
        )
        self.query = query
        self.sums = self.scorer.arrive(self.tokens)[0].clone()
        self.snapshots: list[Tensor] = []

    def add(self, probability: Tensor, first_row: int) -> None:
        """Rows ``[Hkv, G, T, S']`` of attention, the first of them row `first_row`."""
        if first_row == self.prompt_tokens:
            self._finish()
        if first_row in self.snapshots_at:
            self.snapshots.append(self._rank(first_row))
        if not self.scorer.uses_attention:
            return
        heads, groups, count, seen = probability.shape
        row = torch.arange(first_row, first_row + count, device=self.sums.device)
        weight = self.scorer.row_weight(row) * (row >= self.first_vote) / groups
        if not bool(weight.any()):
            return
        rows = Rows(weight.expand(heads, -1), row.expand(heads, -1), row)
        near, stride = self.keep.score_rows, self.keep.score_stride
        if near is not None and stride is not None:
            key = torch.arange(seen, device=row.device)
            probability = probability * pair_weight(row, key, self.first_last, near, stride)
        votes = self.scorer.collect(probability, rows)
        if self.scorer.across_heads:
            votes = votes.mean(0, keepdim=True).expand_as(votes)
        self.sums[:, :seen] = self.scorer.merge(self.sums[:, :seen], votes)

    def _finish(self) -> None:
        """The prompt proper has ended: its tokens stand side by side."""
        stop = self.prompt_tokens
        first = max(0, stop - self.scorer.query_rows)
        tokens = self.tokens
        prompt = replace(
            tokens,
            key=tokens.key[:, :, :stop],
            value=tokens.value[:, :, :stop],
            position=tokens.position[:stop],
            valid=tokens.valid[:, :stop],
            query=self.query[None, :, :, first:stop],
            hidden=None if tokens.hidden is None else tokens.hidden[:, :stop],
        )
        score = self.sums[None, :, :stop]
        self.sums[:, :stop] = finished(self.scorer, score, prompt, self.keep.pool_tokens)[0]

    def _rank(self, rows: int) -> Tensor:
        """Rank of each token after `rows` rows."""
        votes = rows - self.position.clamp(min=self.first_vote)
        rank = self.scorer.rank(self.sums, votes, rows - 1)
        return rank.masked_fill(self.position >= rows, -torch.inf)

    def ranks(self) -> Tensor:
        return torch.stack(self.snapshots)


class RowSink(Protocol):
    """Sees the attention of `attend` rows by rows."""

    @property
    def snapshots_at(self) -> Collection[int]:
        """Rows at which a part has to begin."""

    def add(self, probability: Tensor, first_row: int) -> None:
        """Rows ``[Hkv, G, T, S']`` of attention, the first of them row `first_row`."""


Observer = Callable[[LayerRows], None]
KeyObserver = Callable[[int, Tensor], None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, sums: RowSink | None
) -> Tensor:
    """Exact attention ``[Hkv, G, S, Dv]`` in float32, chunk by chunk; raises `sums` on the way."""
    heads, groups, length, _ = query.shape
    out = query.new_empty(heads, groups, length, value.shape[-1])
    edges = {*range(0, length, CHUNK_ROWS), length} | set(sums.snapshots_at if sums else ())
    for low, high in pairwise(sorted(edges)):
        probability = softmax.logits(query[:, :, low:high], key[:, :high])
        hidden = ~softmax.visible(low, high - low, high, key.device)
        probability = probability.masked_fill_(hidden, -torch.inf).softmax(-1)
        block = probability.flatten(1, 2) @ value[:, :high]
        out[:, :, low:high] = block.unflatten(1, (groups, high - low))
        if sums is not None:
            sums.add(probability, low)
    return out


@contextmanager
def watching_rows(
    model: Any,
    shape: ModelShape,
    keep: Keep,
    observer: Observer,
    rotations: Sequence[Rotation | None] = (),
    tensors: dict[int, dict[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Within the block, each forward of one unpadded prompt calls `observer` for every layer.

    Args:
        rotations: rotary embedding of each layer, for scorers that need it.
        tensors: per layer what was trained for the scorer.
    """
    residual: dict[int, Tensor] = {}
    needs_hidden = "hidden" in scorer(keep.scorer).needs

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            newest = hidden[0, -held_out_rows(hidden.shape[1]) :]
            residual[layer] = newest.float()

        return hook

    def run(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        softmax = Softmax(scaling, softcap, shape.sliding_windows[layer])
        query, key, value = grouped(q, k), k.float(), v.float()
        rows = held_out_rows(q.shape[1])
        sums = ColumnSums(
            keep,
            query,
            key,
            value,
            q.shape[1] - rows,
            module=module,
            scaling=scaling,
            rotation=rotations[layer] if rotations else None,
            tensors=(tensors or {}).get(layer),
            hidden=inputs.pop(module, None),
        )
        out = attend(query, key, value, softmax, sums)
        observer(
            LayerRows(
                layer,
                module,
                softmax,
                query[:, :, -rows:],
                key,
                value,
                out[:, :, -rows:],
                q.shape[1] - rows,
                sums.ranks(),
                residual.pop(layer),
            )
        )
        return out.flatten(0, 1)

    hooks = [
        layer.register_forward_pre_hook(note(i), with_kwargs=True)
        for i, layer in enumerate(decoder_layers(model, shape.layers))
    ]
    try:
        with inputs_of_attention(model, needs_hidden) as inputs, attention_through(model, run):
            yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def watching_keys(model: Any, shape: ModelShape, observer: KeyObserver) -> Iterator[None]:
    """As `watching_rows`, for the keys ``[Hkv, S, D]`` alone, as they enter the attention."""

    def run(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        observer(layer, k.float())
        softmax = Softmax(scaling, softcap, shape.sliding_windows[layer])
        return attend(grouped(q, k), k.float(), v.float(), softmax, None).flatten(0, 1)

    with attention_through(model, run):
        yield


@contextmanager
def inputs_of_attention(model: nn.Module, wanted: bool) -> Iterator[dict[nn.Module, Tensor]]:
    """Within the block, the newest input ``[S, hidden]`` of each attention module, float32.

    Args:
        wanted: False leaves the model alone; the mapping stays empty.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[module] = hidden[0].float()

    numbered = [m for m in model.modules() if hasattr(m, "layer_idx")]
    innermost = [
        m for m in numbered if not any(hasattr(c, "layer_idx") for c in m.modules() if c is not m)
    ]
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in innermost if wanted]
    try:
        yield inputs
    finally:
        for handle in hooks:
            handle.remove()


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """``[Hq, T, D]`` as ``[Hkv, G, T, D]`` float32: keys are shared, never repeated."""
    return query.float().unflatten(0, (key.shape[0], -1))


@torch.inference_mode()
def forward(model: Any, ids: list[int]) -> None:
    """One prompt through the decoder; its logits are not wanted."""
    tokens = torch.tensor([ids], device=model.device)
    model.base_model(input_ids=tokens, use_cache=False)
