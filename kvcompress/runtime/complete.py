"""One completion of a prompt, and the bytes that its cache held at the end."""

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
from kvcompress.runtime.names import as_argument, cache_of

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
) -> Completion:
    """Go on from `prompt` with a model that has a plan attached.

    Args:
        temperature: 0 is greedy.
        stream: print each token on stdout as it comes.
        protect: tokens of the prompt that are never evicted, see `CompressedCache`.

    Raises:
        ValueError: if the prompt has no token at all.
    """
    import torch
    from transformers import TextStreamer

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError("the prompt is empty and the tokenizer adds nothing; give some text")
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    output = cast(Any, model.generate)(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        **as_argument(new_cache(model, protect=protect)),
        return_dict_in_generate=True,
        streamer=TextStreamer(tokenizer, skip_prompt=True) if stream else None,
    )
    cache = cache_of(output)
    assert isinstance(cache, CompressedCache)
    new_ids = output.sequences[0, prompt_tokens:]
    return Completion(
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)),
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
