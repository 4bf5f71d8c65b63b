"""Train the small model that ships in kvcompress/demo, from nothing, on text that Python carries.

    python tools/train_demo_model.py -o out/demo --minutes 100          # CPU, 2 cores
    python tools/train_demo_model.py -o out/demo --minutes 10 --device cuda

A curriculum, because recall appears as a sudden phase change and each stage makes the next one
cheap: copying (repeated random segments) gives induction heads, dense recall (short documents, many
questions) gives key matching, then documents grow to the trained length, with text between notes.
A stage ends when its probe passes its bar or when its share of the time is spent. Stopped at any
moment, the same command goes on from the last checkpoint; `--seed` fixes the data order.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcompress.tasks.documents import count_notes, hop_notes, recall_notes
from kvcompress.tasks.words import COUNT_WORDS, KEY_WORDS, VALUE_WORDS
from kvcompress.tokenizer import CALIBRATION_KEY

VOCAB_SIZE = 1536
TRAINED_TOKENS = 1024
HELD_OUT_CHARS = 60_000
IGNORED = -100


# ---- text
def documentation() -> tuple[str, str]:
    """(training text, held-out text): the language reference and docstrings that Python ships."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    held, train = [], []
    for name in names:
        held_chars = sum(map(len, held))
        (held if held_chars < HELD_OUT_CHARS else train).append(topics[name])
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        train += docstrings(path)
    return "\n".join(train), "\n".join(held)


def docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text and len(text) > 80 and text.isascii()]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the task words are repeated until each is one token."""
    words = [f" {word}" for word in (*KEY_WORDS, *VALUE_WORDS, *COUNT_WORDS)]
    heads = ["Note: ", "Ask: ", "Link: ", "Follow: ", "Mark: ", "Count: "]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, *(["".join(words + heads)] * 4000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=TRAINED_TOKENS,
        **{CALIBRATION_KEY: "notes"},
    )


# ---- data
@dataclass
class Source:
    """Draws training rows of exactly `length` tokens: (ids, labels)."""

    tokenizer: PreTrainedTokenizerFast
    text_ids: list[int]
    rng: random.Random

    def __post_init__(self) -> None:
        backend = self.tokenizer.backend_tokenizer

        @lru_cache(200_000)
        def encode(piece: str) -> tuple[int, ...]:
            return tuple(backend.encode(piece, add_special_tokens=False).ids)

        self.encode: Callable[[str], tuple[int, ...]] = encode
        self.newline = encode("\n")[0]
        self.word_ids = [encode(f" {w}")[0] for w in (*KEY_WORDS, *VALUE_WORDS)]

    def copying(self, length: int) -> tuple[list[int], list[int]]:
        """Random segments, repeated at once or later; loss on repeats after their first token."""
        rng = self.rng
        pool = self.word_ids if rng.random() < 0.7 else list(range(3, VOCAB_SIZE))
        ids: list[int] = [self.tokenizer.bos_token_id]
        labels = [IGNORED]
        earlier: list[list[int]] = []
        while len(ids) < length:
            if earlier and rng.random() < 0.6:
                segment = rng.choice(earlier)
                ids += segment
                labels += [IGNORED, *segment[1:]]
            else:
                segment = rng.choices(pool, k=rng.randint(2, 24))
                earlier = [*earlier, segment][-24:]
                ids += segment
                labels += [IGNORED] * len(segment)
        return ids[:length], labels[:length]

    def text(self, length: int) -> tuple[list[int], list[int]]:
        start = self.rng.randrange(len(self.text_ids) - length)
        ids = [self.tokenizer.bos_token_id, *self.text_ids[start : start + length - 1]]
        if self.rng.random() < 0.15:  # the same text again: long verbatim copying
            half = length // 2
            ids = ids[: length - half] + ids[1 : half + 1]
        return ids, list(ids)

    def notes(self, length: int, filler: float, max_words: int) -> tuple[list[int], list[int]]:
        """A document of mixed notes with `filler` of its length ordinary text, then questions."""
        rng = self.rng
        ask_share = 0.5 if filler == 0 else rng.uniform(0.1, 0.35)
        note_tokens = int(length * (1 - ask_share) * (1 - filler))
        count = max(2, min(40, int(note_tokens / (6 + (1 + max_words) / 2))))
        kind = rng.random()
        if kind < 0.8:
            notes = recall_notes(rng, count, max_words)
        elif kind < 0.92:
            notes = hop_notes(rng, max(1, min(20, count // 2)), max_words)
        else:
            notes = count_notes(rng, max(1, min(8, count // 4)))
            notes += recall_notes(rng, max(2, count // 3), max_words)
        rng.shuffle(notes)
        filler_tokens = int(length * (1 - ask_share) * filler)
        gaps = sorted(rng.random() for _ in notes)
        start = rng.randrange(len(self.text_ids) - length)
        ids, labels = [self.tokenizer.bos_token_id], [IGNORED]
        used = 0
        for note, gap in zip(notes, gaps, strict=True):
            end = int(gap * filler_tokens)
            piece = self.text_ids[start + used : start + end]
            used = end
            if piece:
                ids += [*piece, self.newline]
                labels += [*piece, IGNORED]
            line = self.encode(note.line)
            ids += line
            labels += [IGNORED] * len(line)
        asked = [note for note in notes if note.question]
        while len(ids) < length:
            for note in rng.sample(asked, len(asked)):
                question, answer = self.encode(note.question), self.encode(note.answer)
                ids += [*question, *answer, self.newline]
                labels += [IGNORED] * len(question) + [*answer, self.newline]
        return ids[:length], labels[:length]


@dataclass(frozen=True)
class Stage:
    name: str
    length: int
    rows: int
    share: float  # of the whole time
    bar: float  # probe accuracy that ends the stage early
    mix: tuple[float, float, float]  # copying, text, notes
    filler: tuple[float, float]  # range of the share of text in a notes document
    max_words: int


STAGES = (
    Stage("copy", 64, 40, 0.12, 0.95, (1.0, 0.0, 0.0), (0.0, 0.0), 4),
    Stage("dense", 192, 24, 0.22, 0.97, (0.15, 0.10, 0.75), (0.0, 0.0), 6),
    Stage("middle", 512, 10, 0.20, 0.96, (0.1, 0.25, 0.65), (0.0, 0.6), 12),
    Stage("long", 1024, 6, 0.45, 2.0, (0.05, 0.35, 0.60), (0.0, 0.85), 16),
)


def batches(source: Source, stage: Stage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        rows = []
        for _ in range(stage.rows):
            kind = source.rng.choices("ctn", weights=stage.mix)[0]
            if kind == "c":
                rows.append(source.copying(stage.length))
            elif kind == "t":
                rows.append(source.text(stage.length))
            else:
                filler = source.rng.uniform(*stage.filler)
                rows.append(source.notes(stage.length, filler, stage.max_words))
        ids, labels = zip(*rows, strict=True)
        yield torch.tensor(ids), torch.tensor(labels)


# ---- model
def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=TRAINED_TOKENS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation="sdpa",
        )
    )


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def probe(model: LlamaForCausalLM, source: Source, stage: Stage, device: str) -> dict[str, float]:
    """Token accuracy where a repeat or an answer is predicted, and loss on text."""
    model.eval()
    held = Source(source.tokenizer, source.text_ids, random.Random(7))
    result = {}
    for name in ("copying", "notes", "text"):
        if name == "notes" and stage.name == "copy":
            continue
        rows = []
        for _ in range(8):
            if name == "notes":
                rows.append(held.notes(stage.length, sum(stage.filler) / 2, stage.max_words))
            else:
                rows.append(getattr(held, name)(stage.length))
        ids, labels = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        target = labels[:, 1:]
        scored = target != IGNORED
        if name == "text":
            result["text_loss"] = torch.nn.functional.cross_entropy(
                logits[scored], target[scored]
            ).item()
        else:
            words = torch.isin(target, torch.tensor(source.word_ids, device=device))
            hit = logits.argmax(-1) == target
            result[name] = hit[scored & words].float().mean().item()
            if name == "notes":
                first = scored & words & (labels[:, :-1] == IGNORED)
                result["first"] = hit[first].float().mean().item()
    model.train()
    return result


# ---- run
def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train_text, held_text = documentation()
    tokenizer_dir = out / "tokenizer"
    if not tokenizer_dir.exists():
        train_tokenizer(train_text).save_pretrained(tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    (out / "held_out.txt").write_text(held_text)
    text_ids = tokenizer(train_text, add_special_tokens=False)["input_ids"]
    print(f"{len(text_ids)} tokens of text, device {args.device}", flush=True)

    model = build_model().to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    opts = optimizers(model, args.lr)
    state = {"stage": 0, "step": 0, "spent_s": 0.0, "stage_s": 0.0, "tokens": 0}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, part in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(part)
        state = saved["state"]
        print(f"resumed at {state}", flush=True)
    source = Source(tokenizer, text_ids, random.Random(args.seed * 1_000_003 + state["step"]))
    forward = torch.compile(model, dynamic=False) if args.compile else model
    total_s = args.minutes * 60

    while state["stage"] < len(STAGES):
        stage = STAGES[state["stage"]]
        if run_stage(args, stage, model, forward, opts, source, state, total_s, checkpoint):
            return
        state["stage"] += 1
        state["stage_s"] = 0.0
        save(checkpoint, model, opts, state)
    export(model, tokenizer, held_text, out, state, args)


def run_stage(
    args: argparse.Namespace,
    stage: Stage,
    model: LlamaForCausalLM,
    forward: torch.nn.Module,
    opts: list[torch.optim.Optimizer],
    source: Source,
    state: dict,
    total_s: float,
    checkpoint: Path,
) -> bool:
    """True if the run must stop here (only `--stop-after`), else the stage is over."""
    rows = stage.rows * (8 if args.device == "cuda" else 1)
    data = batches(source, Stage(**{**stage.__dict__, "rows": rows}))
    final = state["stage"] == len(STAGES) - 1
    budget_s = total_s - state["spent_s"] if final else stage.share * total_s - state["stage_s"]
    start, last, done_s = time.monotonic(), time.monotonic(), 0.0
    autocast = torch.autocast(args.device, torch.bfloat16)
    losses: list[float] = []
    while done_s < budget_s:
        decay = 1.0
        if final:  # linear decay over the last two fifths of the final stage
            decay = min(1.0, max(0.02, (budget_s - done_s) / (0.4 * stage.share * total_s)))
        warm = min(1.0, (state["step"] + 1) / 100)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * warm * decay
        ids, labels = (part.to(args.device) for part in next(data))
        with autocast:
            loss = forward(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        state["step"] += 1
        state["tokens"] += ids.numel()
        now = time.monotonic()
        state["spent_s"] += now - last
        state["stage_s"] += now - last
        last, done_s = now, now - start
        if state["step"] % args.probe_every == 0:
            found = probe(model, source, stage, args.device)
            save(checkpoint, model, opts, state)
            print(
                json.dumps(
                    {
                        "stage": stage.name,
                        "step": state["step"],
                        "minutes": round(state["spent_s"] / 60, 1),
                        "tokens_m": round(state["tokens"] / 1e6, 2),
                        "loss": round(sum(losses) / len(losses), 3),
                        **{k: round(v, 4) for k, v in found.items()},
                    }
                ),
                flush=True,
            )
            losses.clear()
            last = time.monotonic()
            if found.get("notes", found["copying"]) >= stage.bar:
                return False
            if math.isnan(found.get("text_loss", 0.0)):
                sys.exit("the loss is not a number: lower --lr and start again")
    return False


def save(path: Path, model: LlamaForCausalLM, opts: list, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "state": dict(state)},
        temporary,
    )
    temporary.replace(path)


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_text: str,
    out: Path,
    state: dict,
    args: argparse.Namespace,
) -> None:
    target = out / "model"
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "held_out.txt").write_text(held_text)
    record = {"seed": args.seed, "minutes": args.minutes, "lr": args.lr, **state}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--probe-every", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
