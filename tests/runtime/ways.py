"""Every way of calling a model that a cache must survive, each as one function.

A way takes a `Subject`, a model beside the function that makes an empty cache for it, and returns
tensors: whole numbers are tokens, the rest are logits. Run on a plain model and on one that the
compressed cache serves, both must return the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from kvcompress.runtime.names import as_argument, cache_of
from tests.runtime.models import PAD, VOCAB, build, prompts

LENGTH: Final = 44
STEPS: Final = 12
PADS: Final = [7, 1, 0]
Results = list[Tensor]


@dataclass(frozen=True)
class Subject:
    """What a way is run on.

    Attributes:
        cache_type: what `generate` must have used; a way fails where it fell back to another.
    """

    family: str
    model: PreTrainedModel
    new_cache: Callable[[], Cache]
    cache_type: type[Cache]


Way = Callable[[Subject], Results]


def generate(subject: Subject, inputs: dict[str, Tensor], **settings: Any) -> Results:
    """Tokens, then the logits of each step; greedy unless `settings` say otherwise."""
    return _generate(subject, inputs, **settings)[0]


def _generate(
    subject: Subject, inputs: dict[str, Tensor], **settings: Any
) -> tuple[Results, Cache]:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 1, **settings}
    out = subject.model.generate(
        **inputs, **settings, return_dict_in_generate=True, output_logits=True
    )
    used = cache_of(out)
    assert type(used) is subject.cache_type, f"generate used a {type(used).__name__}"
    return [out.sequences, *out.logits], used


def _forward(subject: Subject, cache: Cache, ids: Tensor, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids, **as_argument(cache), use_cache=True, **more).logits


def greedy(subject: Subject) -> Results:
    return generate(subject, prompts(3, LENGTH, PADS))


def sampling(subject: Subject) -> Results:
    torch.manual_seed(3)
    return generate(subject, prompts(3, LENGTH, PADS), do_sample=True, top_k=8)


def returns(subject: Subject) -> Results:
    torch.manual_seed(4)
    inputs = prompts(2, LENGTH, PADS[:2])
    return generate(subject, inputs, do_sample=True, top_k=8, num_return_sequences=2)


def beam(subject: Subject) -> Results:
    return generate(subject, prompts(2, LENGTH, PADS[:2]), num_beams=3)


def padded(subject: Subject) -> Results:
    return generate(subject, prompts(3, LENGTH, [LENGTH - 2, 25, 0]))


def early(subject: Subject) -> Results:
    """Rows that end at different steps and are fed padding from there on."""
    inputs = prompts(3, LENGTH, PADS)
    tokens = generate(subject, inputs)[0][:, LENGTH:]
    ends = [int(tokens[0, 2]), int(tokens[1, 6])]
    results = generate(subject, inputs, eos_token_id=ends)
    assert (results[0][:, -1] == PAD).any()
    return [tokens, *results]


def chunked(subject: Subject) -> Results:
    return generate(subject, prompts(3, LENGTH, PADS), prefill_chunk_size=10)


def embeds(subject: Subject) -> Results:
    inputs = prompts(3, LENGTH, PADS)
    with torch.no_grad():
        embedded = subject.model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    with warnings.catch_warnings():  # embeddings do not show the classes of their tokens
        warnings.filterwarnings("ignore", "the plan keeps special tokens", UserWarning)
        return generate(subject, given)


class _Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def streamer(subject: Subject) -> Results:
    heard = _Heard()
    results = generate(subject, prompts(1, LENGTH), streamer=heard)
    assert heard.tokens == [*results[0][0].tolist(), -1]
    return results


def repeating() -> dict[str, Tensor]:
    """One row whose second half is its first: prompt lookup finds candidates in it."""
    half = prompts(1, LENGTH // 2)["input_ids"]
    ids = torch.cat([half, half], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain(subject: Subject) -> Results:
    """What the two drafted ways must equal."""
    return generate(subject, repeating(), max_new_tokens=20)


def lookup(subject: Subject) -> Results:
    return generate(subject, repeating(), max_new_tokens=20, prompt_lookup_num_tokens=3)


def assistant(subject: Subject) -> Results:
    drafts = assistant_of(subject.family)
    return generate(subject, repeating(), max_new_tokens=20, assistant_model=drafts)


def assistant_of(family: str) -> PreTrainedModel:
    """A model that agrees with the family's own now and then.

    Its windows are never full: transformers 5.17 cannot draft beyond an assistant's own window.
    """
    model = build(family, sliding_window=512, attention_chunk_size=512)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.04 * noise * parameter.float().std(correction=0))
    model.generation_config.update(
        num_assistant_tokens=4,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    return model


def turns(subject: Subject) -> Results:
    """Three turns of a conversation on one cache."""
    cache = subject.new_cache()
    inputs = prompts(2, LENGTH // 2, PADS[:2])
    later = prompts(4, 20)["input_ids"][2:]
    results: Results = []
    for low, high in ((0, 12), (12, 13), (13, 20)):
        found = generate(subject, inputs, **as_argument(cache), max_new_tokens=6)
        results += found
        ids = torch.cat([found[0], later[:, low:high]], 1)
        added = ids.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1)
        inputs = {"input_ids": ids, "attention_mask": mask}
    return results


def manual(subject: Subject) -> Results:
    """A loop by hand, without a mask, in forwards of unequal length."""
    cache, ids = subject.new_cache(), prompts(2, 60)["input_ids"]
    results, low = [], 0
    for length in (30, 1, 1, 9, 1, 2, 1, 1, 1, 1, 1, 1):
        results.append(_forward(subject, cache, ids[:, low : low + length]))
        low += length
    assert cache.get_seq_length() == low
    return results


def reuse(subject: Subject) -> Results:
    """A cache that is reset between two generations; `fresh` is what it must equal."""
    cache = subject.new_cache()
    generate(subject, prompts(3, LENGTH, PADS), **as_argument(cache))
    cache.reset()
    return generate(subject, _second_prompt(), **as_argument(cache))


def fresh(subject: Subject) -> Results:
    return generate(subject, _second_prompt(), **as_argument(subject.new_cache()))


def _second_prompt() -> dict[str, Tensor]:
    inputs = prompts(5, 30, [0, 0, 3, 0, 9])
    return {name: tensor[2:] for name, tensor in inputs.items()}


def copied(subject: Subject) -> Results:
    """A copy and its original go on with different tokens."""
    cache, ids = subject.new_cache(), prompts(2, LENGTH)["input_ids"]
    results = [_forward(subject, cache, ids)]
    other = copy.deepcopy(cache)
    for step in range(4):
        one = torch.full((2, 1), 9 + step)
        results.append(_forward(subject, cache, one))
        results.append(_forward(subject, other, one + 20))
    return results


def interleaved(subject: Subject) -> Results:
    """Two caches of one model take turns."""
    caches = [subject.new_cache(), subject.new_cache()]
    texts = [prompts(1, 60)["input_ids"], prompts(3, 60)["input_ids"][1:]]
    results, low = [], [0, 0]
    for lengths in ((20, 33), (1, 1), (1, 4), (5, 1), (1, 1), (1, 1)):
        for which, length in enumerate(lengths):
            part = texts[which][:, low[which] : low[which] + length]
            results.append(_forward(subject, caches[which], part))
            low[which] += length
    return results


def forced(subject: Subject) -> Results:
    """The same tokens whatever the logits: to compare dtypes, whose greedy tokens may differ."""
    cache, inputs = subject.new_cache(), prompts(3, 60, PADS)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    results = []
    for low, high in ((0, LENGTH), *((step, step + 1) for step in range(LENGTH, 60))):
        logits = _forward(
            subject,
            cache,
            inputs["input_ids"][:, low:high],
            attention_mask=mask[:, :high],
            position_ids=positions[:, low:high],
        )
        results.append(logits[:, -1])
    return results


# the way, and the one that a plain model runs beside it where that is another
WAYS: Final[dict[str, tuple[Way, Way]]] = {
    "greedy": (greedy, greedy),
    "sampling": (sampling, sampling),
    "beam 3": (beam, beam),
    "returns": (returns, returns),
    "chunks": (chunked, chunked),
    "lookup": (lookup, plain),
    "assistant": (assistant, plain),
    "turns": (turns, turns),
    "embeds": (embeds, embeds),
    "manual": (manual, manual),
    "streamer": (streamer, streamer),
    "padded": (padded, padded),
    "early eos": (early, early),
    "reset": (reuse, fresh),
    "deepcopy": (copied, copied),
    "two caches": (interleaved, interleaved),
}
DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
assert VOCAB > LENGTH * 2
