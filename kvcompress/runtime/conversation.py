"""Several turns on one cache: each turn reads only what it adds to the text so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcompress.errors import KVCompressError
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.complete import Completion, completion, go_on
from kvcompress.runtime.model.chat import conversation_text, has_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    Attributes:
        completion: its prompt is the whole conversation up to the answer.
        read_tokens: of the conversation, how many this turn had to read.
        read_again: whether they are all of it, because the chat template writes earlier turns
            otherwise than they were read: it may leave out thoughts, or trim an answer.
    """

    completion: Completion
    read_tokens: int
    read_again: bool


class Conversation:
    """Turns of a user and a model that has a plan attached.

    The text so far is what the template wrote and the model went on with. A turn takes over its
    ids, not the ids of the same text read anew, which may be others, and adds what the template
    writes after it.

    Attributes:
        cache: holds every token so far but the last one of the last answer.
        messages: the conversation, as the chat template takes it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        system: str = "",
        stream: bool = False,
    ) -> None:
        """See `complete` for the arguments.

        Args:
            system: the first message, which says how to answer; empty is what the template has.

        Raises:
            KVCompressError: if the tokenizer has no chat template.
        """
        import torch

        if not has_template(tokenizer):
            raise KVCompressError(
                "the tokenizer has no chat template, so nobody knows how this model writes a "
                "conversation; kvcompress generate goes on from a text"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature, self.stream = max_new_tokens, temperature, stream
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cache = new_cache(model)
        self._ids: list[int] = []
        self._written = ""  # what the template wrote up to the last answer
        self._answer: list[int] = []
        torch.manual_seed(seed)

    def say(self, text: str) -> Reply:
        """The model's answer to `text`.

        Raises:
            KVCompressError: if the chat template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        written = conversation_text(self.tokenizer, messages, to_answer=True)
        ids = self._continued(written)
        read_again = ids is None
        if ids is None:
            ids, self.cache = self._encoded(written), new_cache(self.model)
        read_tokens = len(ids) - self.cache.get_seq_length()
        answer = go_on(
            self.model,
            self.tokenizer,
            ids,
            self.cache,
            self.max_new_tokens,
            self.temperature,
            self.stream,
        )
        told = completion(self.tokenizer, len(ids), answer, self.cache)
        self.messages = [*messages, {"role": "assistant", "content": told.text}]
        self._ids, self._written, self._answer = ids, written, answer
        return Reply(told, read_tokens, read_again)

    def _continued(self, written: str) -> list[int] | None:
        """Ids of `written` that begin with what the cache holds; None where they cannot.

        The last token of an answer is not in the cache yet. It is left out where the template ends
        a turn in another way than the model did.
        """
        for answer in (self._answer, self._answer[:-1]):
            said = self.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
            so_far = f"{self._written}{said}"
            if written.startswith(so_far):
                return [*self._ids, *answer, *self._encoded(written[len(so_far) :])]
        return None

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
