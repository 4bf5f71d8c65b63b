"""vLLM's decode steps on a CPU, in an environment of its own.

    .venv-vllm/bin/python benchmarks/vllm_cpu/run.py --model DIR --context 4096 --batch 1

Started by benchmarks/decode.py, which tells it over a pipe when to take its turn, or by hand with
``--alone``, which times a few windows and prints them. The prompt is real: vLLM has no way to be
given a cache. One engine step is one token of every row. Works without a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from speed.protocol import Record, Replies, serve

from kvcompress.measure.timing import stopwatch

# spinning threads and threads bound to cores wait for one another on a shared machine
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "0",
}
BLOCK_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="weights and config.json")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--room", type=int, default=64, help="most tokens to decode after it")
    parser.add_argument("--reads", action="store_true", help="time prompts, not decode steps")
    parser.add_argument("--alone", action="store_true", help="time a few windows and print them")
    args = parser.parse_args()
    _restart_with(VARIABLES)
    replies = Replies()
    engine = Engine(args.model, args.context, args.batch, args.room)
    if not args.alone:
        serve(replies, engine.facts(), engine.prompts if args.reads else engine.window)
        return
    engine.window(2)
    windows = [engine.window(4) for _ in range(max(1, min(5, (args.room - 3) // 5)))]
    replies.send({"facts": engine.facts(), "windows": windows})


def _restart_with(variables: dict[str, str]) -> None:
    """Libraries read these, and the preloaded ones, when the process starts."""
    wanted = {**variables, **_preloaded()}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def _preloaded() -> dict[str, str]:
    """What vLLM advises to preload, where it is there: Intel's OpenMP and tcmalloc."""
    candidates = [
        os.environ.get("TCMALLOC", "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
        str(Path(sys.prefix) / "lib" / "libiomp5.so"),
    ]
    found = [path for path in candidates if Path(path).is_file()]
    return {"LD_PRELOAD": ":".join(found)} if found else {}


class Engine:
    """An engine that has read its prompts."""

    def __init__(self, model: Path, context: int, batch: int, room: int) -> None:
        import torch
        from vllm import LLM

        torch.manual_seed(0)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self._config, self._context, self._batch = config, context, batch
        self._llm: Any = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=context + room + 1,
            max_num_seqs=max(batch, 2),
            enforce_eager=True,
            enable_prefix_caching=False,
            block_size=BLOCK_TOKENS,
        )
        self._engine = self._llm.llm_engine
        self._ids = torch.randint(3, config["vocab_size"], (batch, context)).tolist()
        self._number = 0
        self._prompt = timed(lambda: self._read(room), 1)

    def _read(self, new_tokens: int) -> None:
        """Take the prompts in, until each has its first token."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for prompt in self._ids:
            self._number += 1
            self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, params)
        waiting = {str(self._number - row) for row in range(self._batch)}
        while waiting:
            waiting -= {out.request_id for out in self._engine.step()}

    def facts(self) -> Record:
        import torch
        import vllm

        text = self._config
        dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        row = 2 * text["num_key_value_heads"] * dim * 2 * text["num_hidden_layers"]
        blocks = -(-(self._context + 1) // BLOCK_TOKENS) * self._batch
        return {
            "kv_bytes": blocks * BLOCK_TOKENS * row,
            "prompt": self._prompt,
            "threads": torch.get_num_threads(),
            "preloaded": [Path(p).name for p in _preloaded().get("LD_PRELOAD", "").split(":") if p],
            "versions": {"vllm-cpu": vllm.__version__},
        }

    def window(self, steps: int) -> Record:
        """One untimed step, then so many timed ones."""
        self._step()
        return timed(self._step, steps)

    def prompts(self, steps: int) -> Record:
        """So many times the prompts, one token each."""
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return timed(lambda: self._read(1), steps)

    def _step(self) -> None:
        out = self._engine.step()
        if len(out) != self._batch:
            raise RuntimeError(f"a step gave {len(out)} rows of {self._batch}: give more --room")


def timed(run: Callable[[], object], steps: int) -> Record:
    return asdict(stopwatch(run, steps))


if __name__ == "__main__":
    main()
