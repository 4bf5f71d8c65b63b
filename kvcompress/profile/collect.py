"""Run prompts through a model, one forward each, and show every layer's attention to an observer.

A row is one query of the prompt. Rows are taken in chunks of at most 128, so memory is
O(Hq · 128 · S) for one layer at a time, and no [Hq, S, S] matrix ever exists. An observer should
keep little of what it sees. The newest rows of a prompt are held out: they measure how well the
tokens were chosen, so they have no vote in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.evict.finish import finished, output_weight
from kvcompress.evict.score_queries import pair_weight
from kvcompress.evict.scorers import QueryRows, Scorer, Tokens, scorer
from kvcompress.plan import ModelShape
from kvcompress.profile.hf import LayerInput, Softmax, attention_through, decoder_layers
from kvcompress.quant.keystats import KeyStats, Rotation
from kvcompress.recipe import Keep
from kvcompress.runtime.hf.announce import attention_modules

CHUNK_ROWS: Final = 128
BLOCK_ROWS: Final = 8  # held-out rows that share one keep-set
_FEWEST_ROWS, _MOST_ROWS = 64, 128


def held_out_rows(length_tokens: int) -> int:
    """How many of a prompt's newest rows are held out: 64 to 128, at most half of the prompt."""
    return min(max(_FEWEST_ROWS, min(_MOST_ROWS, length_tokens // 16)), length_tokens // 2)


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One layer on one prompt: its held-out rows, and each token's rank by the rows before them.

    Attributes:
        module: the attention module.
        query: ``[Hkv, G, W, D]`` float32, the prompt's last W rows.
        key, value: ``[Hkv, S, D]`` float32.
        output: ``[Hkv, G, W, Dv]`` exact attention output of those rows.
        prompt_tokens: S − W, the first held-out row.
        ranks: ``[W / 8, Hkv, S]`` rank of each token before every eighth held-out row, from the
            rows before it alone. Tokens of larger rank stay; unseen tokens have −inf.
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


class RunningScores:
    """Scores ``[Hkv, S]`` of a layer's tokens, which grow as rows vote one after the other.

    Args:
        prompt_tokens: rows of the prompt proper; `keep.score_rows` counts back from there.
        tensors: what was trained for the scorer, of this layer.
        hidden: ``[S, hidden]`` input of the attention module, for a scorer that needs it.
    """

    def __init__(
        self,
        keep: Keep,
        given: LayerInput,
        prompt_tokens: int,
        rotation: Rotation | None = None,
        tensors: dict[str, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        self.keep, self.scorer = keep, scorer(keep.scorer)
        self.prompt_tokens, self.query = prompt_tokens, given.query
        last = 0 if keep.score_rows is None else max(0, prompt_tokens - keep.score_rows)
        self.first_last = last  # from this row on, a row votes for every token that it sees
        self.first_vote = last if keep.score_stride is None else 0
        heads, tokens, _ = given.key.shape
        self.snapshots_at = range(prompt_tokens, tokens, BLOCK_ROWS)
        self.tokens = replace(
            tokens_of(given, self.scorer),
            hidden=None if hidden is None else hidden[None],
            rotation=rotation,
            tensors=tensors or {},
        )
        self.position = self.tokens.position.expand(heads, tokens)
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
        rows = QueryRows(weight.expand(heads, -1), row.expand(heads, -1), row)
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


def tokens_of(given: LayerInput, scorer: Scorer, length: int | None = None) -> Tokens:
    """The first `length` tokens of a prompt as a scorer sees them; None is all of them.

    Queries are left out: a scorer gets them at the prompt's end.
    """
    heads, groups = given.query.shape[:2]
    key, value = given.key[:, :length], given.value[:, :length]
    split = None
    if "output_weight" in scorer.needs:
        split = output_weight(given.module, heads, groups * value.shape[-1])
    return Tokens(
        layer=given.layer,
        head=torch.arange(heads, device=key.device),
        key=key[None],
        value=value[None],
        position=torch.arange(key.shape[1], device=key.device),
        valid=torch.ones(1, key.shape[1], dtype=torch.bool, device=key.device),
        query=given.query[None, :, :, :0],
        scaling=given.softmax.scaling,
        output_weight=split,
    )


class RowSink(Protocol):
    """Is shown the attention of `attend`, a few rows at a time."""

    @property
    def snapshots_at(self) -> Collection[int]:
        """Rows at which a part has to begin."""

    def add(self, probability: Tensor, first_row: int) -> None:
        """Rows ``[Hkv, G, T, S']`` of attention, the first of them row `first_row`."""


def attend(
    given: LayerInput, sink: RowSink | None = None, rows_at_once: int = CHUNK_ROWS
) -> Tensor:
    """Exact attention ``[Hkv, G, S, Dv]`` in float32, by chunks, each shown to `sink`."""
    query, key, value, softmax = given.query, given.key, given.value, given.softmax
    heads, groups, length, _ = query.shape
    out = query.new_empty(heads, groups, length, value.shape[-1])
    edges = {*range(0, length, rows_at_once), length} | set(sink.snapshots_at if sink else ())
    for low, high in pairwise(sorted(edges)):
        probability = softmax.logits(query[:, :, low:high], key[:, :high])
        hidden = ~softmax.visible(low, high - low, high, key.device)
        probability = probability.masked_fill_(hidden, -torch.inf).softmax(-1)
        block = probability.flatten(1, 2) @ value[:, :high]
        out[:, :, low:high] = block.unflatten(1, (groups, high - low))
        if sink is not None:
            sink.add(probability, low)
    return out


def collected(
    model: PreTrainedModel,
    shape: ModelShape,
    keep: Keep,
    ids: list[int],
    rotations: Sequence[Rotation | None] = (),
    tensors: dict[int, dict[str, Tensor]] | None = None,
    rows_at_once: int = CHUNK_ROWS,
) -> list[LayerRows]:
    """Every layer on one prompt, in order. Arguments as for `watching_rows`."""
    found: dict[int, LayerRows] = {}

    def note(rows: LayerRows) -> None:
        found[rows.layer] = rows

    with watching_rows(model, shape, keep, note, rotations, tensors, rows_at_once):
        forward(model, ids)
    return [found[layer] for layer in range(shape.layers)]


@contextmanager
def watching_rows(
    model: PreTrainedModel,
    shape: ModelShape,
    keep: Keep,
    observer: Callable[[LayerRows], None],
    rotations: Sequence[Rotation | None] = (),
    tensors: dict[int, dict[str, Tensor]] | None = None,
    rows_at_once: int = CHUNK_ROWS,
) -> Iterator[None]:
    """Within the block, each forward of one unpadded prompt calls `observer` for every layer.

    Args:
        rotations: rotary embedding of each layer, for scorers that need it.
        tensors: per layer what was trained for the scorer.
        rows_at_once: rows of attention that are held at a time.

    Raises:
        ValueError: where the scorer needs rotary embeddings and none are given.
    """
    needs = scorer(keep.scorer).needs
    if "rotation" in needs and len(rotations) != shape.layers:
        raise ValueError(f"the scorer {keep.scorer!r} needs the rotary embedding of every layer")
    needs_hidden = "hidden" in needs

    def run(given: LayerInput) -> Tensor:
        layer, length = given.layer, given.key.shape[1]
        rows = held_out_rows(length)
        scores = RunningScores(
            keep,
            given,
            length - rows,
            rotation=rotations[layer] if rotations else None,
            tensors=(tensors or {}).get(layer),
            hidden=inputs.pop(given.module) if needs_hidden else None,
        )
        out = attend(given, scores, rows_at_once)
        observer(
            LayerRows(
                layer,
                given.module,
                given.softmax,
                given.query[:, :, -rows:].clone(),  # a view would keep all rows
                given.key,
                given.value,
                out[:, :, -rows:].clone(),
                length - rows,
                scores.ranks(),
                residual.pop(layers[layer])[-rows:].clone(),
            )
        )
        return out

    layers = decoder_layers(model, shape.layers)
    attention = attention_modules(model) if needs_hidden else []
    with inputs_of(layers) as residual, inputs_of(attention) as inputs:
        with attention_through(model, shape, run):
            yield


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within the block, the newest input ``[S, hidden]`` of each of these modules, float32."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[module] = hidden[0].float()

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield inputs
    finally:
        for handle in hooks:
            handle.remove()


def key_moments(
    model: PreTrainedModel, shape: ModelShape, rotations: Sequence[Rotation | None], ids: list[int]
) -> list[KeyStats]:
    """Moments of one prompt's keys in each layer, once the layer's rotary embedding is undone."""
    found: dict[int, KeyStats] = {}

    def run(given: LayerInput) -> Tensor:
        key, rotation = given.key.double(), rotations[given.layer]
        if rotation is not None:
            position = torch.arange(key.shape[1], device=key.device)
            key = rotation.turn(key, position, sign=-1)
        found[given.layer] = KeyStats.of(key)
        return attend(given)

    with attention_through(model, shape, run):
        forward(model, ids)
    return [found[layer] for layer in range(shape.layers)]


@torch.no_grad()
def forward(model: PreTrainedModel, ids: list[int]) -> None:
    """Run one prompt through the decoder, without the head that makes logits."""
    tokens = torch.tensor([ids], device=model.device)
    model.base_model(input_ids=tokens, use_cache=False)
