"""One answer to a prompt, and the bytes that its cache held at the end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kvcompress.accounting import kv_bytes
from kvcompress.plan import Plan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.cache.spans import Span
from kvcompress.runtime.model.chat import conversation_text, has_template
from kvcompress.runtime.names import as_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """Text that was generated, and the bytes that its cache measured.

    Attributes:
        pays_from_tokens: from about this length on, the plan's cache is smaller than one in 16
            bits. It is exact to a few tokens, as budgets are rounded. None where no length that the
            model was made for is long enough.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    kv_cache_bytes: int
    bf16_kv_cache_bytes: int
    pays_from_tokens: int | None


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
    protect: Sequence[Span] = (),
    raw: bool = False,
) -> Completion:
    """Answer `prompt`, or go on from it, with a model that has a plan attached.

    Args:
        temperature: 0 is greedy.
        stream: print each token on stdout as it comes.
        protect: tokens of the prompt that are never evicted, see `CompressedCache`.
        raw: go on from the prompt as it is, also where the tokenizer has a chat template.

    Raises:
        ValueError: if the prompt has no token at all.
        KVCompressError: if the chat template refuses the prompt.
    """
    import torch

    if raw or not has_template(tokenizer):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = conversation_text(tokenizer, [{"role": "user", "content": prompt}], to_answer=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer adds nothing; give some text")
    torch.manual_seed(seed)
    cache = new_cache(model, protect=protect)
    new_ids = go_on(model, tokenizer, ids, cache, max_new_tokens, temperature, stream)
    return completion(tokenizer, len(ids), new_ids, cache)


def go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    cache: CompressedCache,
    max_new_tokens: int,
    temperature: float,
    stream: bool,
) -> list[int]:
    """The ids that `generate` puts after `ids`, of which `cache` may hold the first ones."""
    import torch
    from transformers import TextStreamer

    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    inputs = torch.tensor([list(ids)], device=model.device)
    output = cast(Any, model.generate)(
        inputs,
        attention_mask=torch.ones_like(inputs),
        **sampling,
        max_new_tokens=max_new_tokens,
        **as_argument(cache),
        return_dict_in_generate=True,
        streamer=shown,
    )
    new_ids: list[int] = output.sequences[0, len(ids) :].tolist()
    return new_ids


def completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
    new_ids: Sequence[int],
    cache: CompressedCache,
) -> Completion:
    """What `new_ids` say, and what `cache` holds after them."""
    return Completion(
        text=str(tokenizer.decode(list(new_ids), skip_special_tokens=True)),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new_ids),
        kv_cache_bytes=cache.nbytes(),
        bf16_kv_cache_bytes=cache.plan.model.bf16_kv_bytes(cache.get_seq_length(), batch=1),
        pays_from_tokens=pays_from(cache.plan),
    )


def pays_from(plan: Plan) -> int | None:
    """See `Completion.pays_from_tokens`; a short text is all sinks and newest tokens."""

    def pays(tokens: int) -> bool:
        return kv_bytes(plan, tokens, 1) < plan.model.bf16_kv_bytes(tokens, 1)

    lengths = range(1, plan.model.max_position + 1)
    if not pays(lengths[-1]):
        return None
    return lengths[bisect_left(lengths, True, key=pays)]
