"""A Llama whose heads are written by hand, so that everybody knows what each of them looks at.

Residual stream: ``[code | previous token's code | answer | constant | class | 0 …]``. A token's
code is plus or minus a unit vector, so codes of two tokens have the product 0 or −1; its class is
one of `CLASSES`. The feed-forward parts are zero.

A key has three parts: `POSITION` pairs of channels that RoPE turns fast, the same for every token;
the identity of the previous token, in pairs that RoPE hardly turns; the token's class. A query
reads one part, so query heads of any kinds can share a KV head:
  sink        the begin token
  special     special tokens, wherever they stand
  punct       punctuation
  frequent    the few words of class ``heavy``
  local       the token `LOCAL_DISTANCE` before it
  previous    the token before it; writes that token's code into the stream
  induction   what followed earlier copies of this token, else the begin token; answers with it
"""

from __future__ import annotations

import math
import random
from typing import Final

import torch
from torch import Tensor

WORDS: Final = tuple(f"w{i:03d}" for i in range(110))
HEAVY: Final = tuple(f"h{i}" for i in range(8))
PUNCT: Final = (".", ",", ";", ":", "!", "?", "-")
SPECIAL: Final = ("<s>", "</s>", "<pad>")
CLASSES: Final = ("begin", "special", "punct", "heavy", "plain")
ONE_QUERY_HEAD: Final = (
    (("sink",), ("punct",), ("local",), ("previous",)),
    (("special",), ("induction",), ("frequent",), ("sink",)),
)
TWO_QUERY_HEADS: Final = (
    (("sink", "special"), ("sink", "punct"), ("local", "punct"), ("previous", "sink")),
    (("punct", "frequent"), ("sink", "induction"), ("special", "special"), ("frequent", "local")),
)

CODE: Final = 64
HIDDEN: Final = 256
HEAD_DIM: Final = 128
PAIRS: Final = HEAD_DIM // 2
POSITION: Final = 30  # pairs of channels; then CODE / 2 pairs of identity, then 2 of classes
THETA: Final = 1e10
LOCAL_DISTANCE: Final = 40
CLASS_LOGIT: Final = 14.0
MATCH_LOGIT: Final = 40.0
LOCAL_LOGIT, PREVIOUS_LOGIT = 6.0, 20.0  # per pair
_CONSTANT: Final = 3 * CODE
_CLASS: Final = _CONSTANT + 1
_TARGETS: Final = {"sink": "begin", "special": "special", "punct": "punct", "frequent": "heavy"}


def tokenizer():
    """A word-level tokenizer, ``<s>`` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate((*SPECIAL, *PUNCT, *HEAVY, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.add_special_tokens(list(SPECIAL))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def class_of(token: int) -> str:
    if token == 0:
        return "begin"
    edges = (len(SPECIAL), len(SPECIAL) + len(PUNCT), len(SPECIAL) + len(PUNCT) + len(HEAVY))
    return CLASSES[1 + sum(token >= edge for edge in edges)]


def text(seed: int, tokens: int, repeated: int) -> list[str]:
    """Words with punctuation, heavy words and separators; the end repeats an early stretch."""
    rng = random.Random(seed)
    kinds = ((WORDS, 0.72), (PUNCT, 0.14), (HEAVY, 0.12), (("</s>",), 0.02))
    pools, shares = zip(*kinds, strict=True)
    fresh = [rng.choice(rng.choices(pools, shares)[0]) for _ in range(tokens - repeated)]
    start = rng.randrange(20, 60)
    return fresh + fresh[start : start + repeated]


def model(heads=ONE_QUERY_HEAD, class_logit=CLASS_LOGIT):
    """The model with the query heads `heads[layer][kv_head][query head]`.

    Args:
        class_logit: of the tokens that a head looks for by class, above 0 for all others.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = len(SPECIAL) + len(PUNCT) + len(HEAVY) + len(WORDS)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=len(heads),
        num_attention_heads=len(heads[0]) * len(heads[0][0]),
        num_key_value_heads=len(heads[0]),
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    planted = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in planted.parameters():
            parameter.zero_()
        codes = token_codes(vocabulary)
        embedding = planted.model.embed_tokens.weight
        embedding[:, :CODE] = codes
        embedding[:, _CONSTANT] = 1.0
        for token in range(vocabulary):
            embedding[token, _CLASS + CLASSES.index(class_of(token))] = 1.0
        for number, (layer, kinds) in enumerate(zip(planted.model.layers, heads, strict=True)):
            # squared length of the stream: code, constant and class; then the previous token too
            layer.input_layernorm.weight.fill_(math.sqrt((3 + number) / HIDDEN))
            _write_attention(layer.self_attn, kinds, class_logit)
        planted.model.norm.weight.fill_(math.sqrt(5 / HIDDEN))
        planted.lm_head.weight[:, 2 * CODE : 3 * CODE] = 20 * codes
    return planted


def model_like(other):
    """A float64 copy that shows its attention weights."""
    exact = type(other)(other.config).double().eval()
    exact.load_state_dict({name: value.double() for name, value in other.state_dict().items()})
    exact.set_attn_implementation("eager")
    return exact


def shuffled_words(seed: int) -> list[str]:
    """Every word, every punctuation mark and every heavy word once."""
    words = [*WORDS, *HEAVY, *PUNCT]
    random.Random(seed).shuffle(words)
    return words


def token_codes(vocabulary: int) -> Tensor:
    """``[vocabulary, CODE]``: unit vectors, then the same with the other sign."""
    assert vocabulary <= 2 * CODE
    return torch.cat([torch.eye(CODE), -torch.eye(CODE)])[:vocabulary]


def _write_attention(attention, kinds, class_logit: float) -> None:
    groups = len(kinds[0])
    for head, shared in enumerate(kinds):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        attention.k_proj.weight[rows] = _key()
        attention.v_proj.weight[rows][:CODE, :CODE] = torch.eye(CODE)
        for member, kind in enumerate(shared):
            own = (head * groups + member) * HEAD_DIM
            query = _query(kind, class_logit) * math.sqrt(HEAD_DIM)
            attention.q_proj.weight[own : own + HEAD_DIM] = query
            target = {"previous": CODE, "induction": 2 * CODE}.get(kind)
            if target is not None:
                writes = attention.o_proj.weight[target : target + CODE]
                writes[:, own : own + CODE] = torch.eye(CODE)


def _identity_channels() -> Tensor:
    pair = torch.arange(POSITION, POSITION + CODE // 2)
    return torch.cat([pair, pair + PAIRS])


def _class_channels() -> Tensor:
    """One channel for each class but ``plain``."""
    return torch.tensor([PAIRS - 2, PAIRS - 1, HEAD_DIM - 2, HEAD_DIM - 1])


def _key() -> Tensor:
    weight = torch.zeros(HEAD_DIM, HIDDEN)
    weight[:POSITION, _CONSTANT] = 1.0
    weight[_identity_channels(), CODE : 2 * CODE] = torch.eye(CODE)
    weight[_class_channels(), _CLASS : _CLASS + 4] = torch.eye(4)
    return weight


def _query(kind: str, class_logit: float) -> Tensor:
    weight = torch.zeros(HEAD_DIM, HIDDEN)
    if kind in ("local", "previous"):
        distance = LOCAL_DISTANCE if kind == "local" else 1
        turned = distance * frequencies()[:POSITION]
        strength = LOCAL_LOGIT if kind == "local" else PREVIOUS_LOGIT
        weight[:POSITION, _CONSTANT] = strength * turned.cos()
        weight[PAIRS : PAIRS + POSITION, _CONSTANT] = -strength * turned.sin()
    elif kind == "induction":
        weight[_identity_channels(), :CODE] = MATCH_LOGIT * torch.eye(CODE)
        weight[_class_channels()[0], _CONSTANT] = MATCH_LOGIT / 2
    else:
        channel = _class_channels()[CLASSES.index(_TARGETS[kind])]
        weight[channel, _CONSTANT] = class_logit
    return weight


def frequencies() -> Tensor:
    """Radians per token of each pair of channels."""
    return THETA ** (-torch.arange(PAIRS) / PAIRS)


def intended(kind: str, ids: list[int]) -> Tensor:
    """``[S, S]`` float64 attention that a head of `kind` should have, from the definition."""
    length = len(ids)
    classes = [class_of(token) for token in ids]
    logits = torch.full((length, length), -torch.inf, dtype=torch.float64)
    speed = THETA ** (-torch.arange(POSITION, dtype=torch.float64) / PAIRS)
    for row in range(length):
        for key in range(row + 1):
            if kind in ("local", "previous"):
                off = row - key - (LOCAL_DISTANCE if kind == "local" else 1)
                strength = LOCAL_LOGIT if kind == "local" else PREVIOUS_LOGIT
                logits[row, key] = strength * (speed * off).cos().sum()
            elif kind == "induction":
                before = ids[max(0, key - 1)]
                product = {0: 1.0, CODE: -1.0}.get(abs(ids[row] - before), 0.0)
                logits[row, key] = MATCH_LOGIT * product
                logits[row, key] += MATCH_LOGIT / 2 * (classes[key] == "begin")
            else:
                logits[row, key] = CLASS_LOGIT * (classes[key] == _TARGETS[kind])
    return logits.softmax(-1)
