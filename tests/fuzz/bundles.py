"""Mutants of bundles: every kind of file, sealed anew as whoever hands one over would; opened, and
run on a prompt, a few tokens, a generation.

Hashes of files, of the configuration and of the tokenizer are those of the mutant.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import kvcompress
from kvcompress.bundle import files, manifest
from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, HeadPlan, Plan
from kvcompress.profile.store import Profile, Provenance
from kvcompress.quant.keystats import KVParams
from kvcompress.quant.weights import FORMATS
from kvcompress.recipe import PARTS, Recipe
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.model.families import config_hash, shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.tokenizer import tokenizer_hash
from tests.fuzz.mutate import Safetensors, mutate_bytes, mutate_safetensors, mutate_tree
from tests.fuzz.run import refusal

LAYERS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 2, 16, 64
FORMAT: Final = {"bf16": 8, "int8": 1, "nf4": 1}  # how often each is tried
SECONDS: Final = 10  # for a mutant; the loader under test must not swallow an alarm
PROMPT, STEPS = 24, 3


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[]))
    made.add_special_tokens(special)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build(folder: Path, weights: str) -> None:
    """A bundle like those that `export` writes, of a model of two small layers."""
    (folder / manifest.FOLDER).mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=128,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if weights != "bf16":
        plain = folder.with_name("plain")
        model.save_pretrained(plain)
        options = FORMATS[weights].load_kwargs(["lm_head"])  # type: ignore[index]
        model = LlamaForCausalLM.from_pretrained(plain, device_map="cpu", **options)
    model.save_pretrained(folder)
    weight_map = dict.fromkeys(Safetensors.of((folder / WEIGHTS).read_bytes()).entries, WEIGHTS)
    _write(folder / manifest.INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    own = json.loads((folder / "config.json").read_text())
    own["kvcompress"] = {"schema": 1, "manifest": manifest.MANIFEST}
    _write(folder / "config.json", own)
    (folder / manifest.CARD).write_text("---\nlicense: mit\n---\n# Tiny\n")
    _measured(folder, Path(weights), tokenizer)
    seal(folder, weights)


WEIGHTS = "model.safetensors"


def _measured(folder: Path, name: Path, tokenizer: Any) -> None:
    """Plan, profile, recipe and constants."""
    sparse = HeadPlan(
        special=True, frequent=Budget(ratio=0.25), local=Budget(tokens=4), k_dtype="int8",
        v_dtype="int4",
    )  # fmt: skip
    plan = Plan(
        model=shape_of(AutoConfig.from_pretrained(folder), torch.bfloat16),
        heads=((sparse, HeadPlan(full=True)), (HeadPlan(full=True, k_dtype="fp8"), sparse)),
        recent_tokens=4,
        special_ids=(0, 1, 2),
        repeat_ids=(5, 6),
        tokenizer_hash=tokenizer_hash(tokenizer),
        max_position=256,
    )
    (folder / manifest.PLAN).write_text(plan.to_json())
    every = (((0.5,),) * KV_HEADS,) * LAYERS
    Profile(
        parts=PARTS, model=str(name), shape=plan.model, recipe=Recipe(),
        provenance=Provenance(
            data="builtin", data_hash="0" * 64, weights_hash="0" * 64, prompts=1, prompt_tokens=64,
            held_out_rows=8, device="cpu", dtype="bfloat16", versions={},
        ),
        tokenizer_hash=str(plan.tokenizer_hash), weight_bytes={}, special_ids=plan.special_ids,
        punct_ids=(), special_share=0.0, punct_share=0.0, rotations=("none",) * LAYERS,
        chain=(HeadPlan(full=True),), recovery=every, recovery_l1=every,
        candidates=(HeadPlan(full=True),), losses=every,
    ).save(folder / manifest.FOLDER)  # fmt: skip
    recipe = Recipe().model_copy(update={"weights": name.name})
    (folder / manifest.RECIPE).write_text(recipe.to_yaml())
    centers = torch.randn(LAYERS, KV_HEADS, HEAD_DIM)
    trained = {"surrogate": tuple(torch.randn(LAYERS, KV_HEADS, HIDDEN + 1))}
    params = KVParams(tuple(centers), tuple(torch.ones_like(centers)), trained)
    params.save(folder / manifest.PARAMS)


def seal(folder: Path, weights: str) -> None:
    """A manifest of the files as they are."""
    names = [name for name in files.tree(folder) if name != manifest.MANIFEST]
    plan = json.loads((folder / manifest.PLAN).read_text())
    data = {
        "schema": 1,
        "kvcompress_version": kvcompress.__version__,
        "created": "2026-01-01T00:00:00+00:00",
        "base_model": {"id": "tiny", "config_hash": plan["model"]["config_hash"]},
        "tokenizer_hash": plan["tokenizer_hash"],
        "weights": {"format": weights, "size_bytes": (folder / WEIGHTS).stat().st_size, "kept": []},
        "needs": ["torch>=2.9"],
        "measured": {"kl": 0.5},
        "files": [entry.model_dump() for entry in files.digests(folder, names)],
    }
    _write(folder / manifest.MANIFEST, data)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


# ---- mutants
def _json_text(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    try:
        return json.dumps(mutate_tree(rng, json.loads(data)), indent=1).encode()
    except RecursionError:  # of the mutator, or the writer
        return b"[" * 5000 + b"]" * 5000


def _yaml_text(rng: Random, data: bytes) -> bytes:
    odd = (b"a: &a [*a, *a]\n", b"<<: {name: x}\n", b"seed: 010\n", b"[" * 3000, b"? [a]\n: b\n",
           b"x: !!python/name:os.system\n", b"'\\ud800': 1\n", b"x: .nan\n",
           b"x: 1:30\n")  # fmt: skip
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        return b"".join([*lines[:at], rng.choice(odd), *lines[at:]])
    import yaml

    try:
        tree = mutate_tree(rng, yaml.safe_load(data))
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000


def _tensor_file(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.1:
        return mutate_bytes(rng, data)
    return mutate_safetensors(rng, Safetensors.of(data)).raw()


Change = Callable[[Random, bytes], bytes]
KINDS: Final[dict[str, Change]] = {
    "config.json": _json_text,
    "generation_config.json": _json_text,
    "tokenizer_config.json": _json_text,
    "tokenizer.json": _json_text,
    manifest.INDEX: _json_text,
    manifest.PLAN: _json_text,
    manifest.PROFILE: _json_text,
    manifest.MANIFEST: _json_text,
    manifest.RECIPE: _yaml_text,
    manifest.PARAMS: _tensor_file,
    WEIGHTS: _tensor_file,
    manifest.CARD: mutate_bytes,
}


class Bench:
    """A bundle on disk whose files are mutated, tried and put back.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.folder = folder / weights / "bundle"
        build(self.folder, weights)
        self.changed: set[str] = set()
        self.whole = {n: p.read_bytes() for n, p in files.tree(self.folder).items()}

    def mutant(self, rng: Random) -> str:
        """Change one file, or sometimes two; gives its name."""
        name = rng.choice(list(KINDS))
        other = rng.choice(list(KINDS)) if rng.random() < 0.1 else name
        for changed in sorted({name, other}):
            self.put(changed, KINDS[changed](rng, self.whole[changed]))
        if name != manifest.MANIFEST:
            self.seal({name, other})
        return name

    def restore(self) -> None:
        for name in sorted(self.changed):
            self.put(name, self.whole[name])
        self.changed.clear()

    def put(self, name: str, data: bytes) -> None:
        self.changed.add(name)
        (self.folder / name).write_bytes(data)

    def seal(self, changed: set[str]) -> None:
        """A manifest of the files as they are; `changed` are those whose contents it repeats."""
        data = json.loads(self.whole[manifest.MANIFEST])
        if changed & {"config.json", "tokenizer.json", "tokenizer_config.json"}:
            self._rehash(data)
        for entry in data["files"]:
            content = (self.folder / entry["path"]).read_bytes()
            entry["size_bytes"] = len(content)
            entry["sha256"] = hashlib.sha256(content).hexdigest()
        data["weights"]["size_bytes"] = (self.folder / WEIGHTS).stat().st_size
        self.put(manifest.MANIFEST, json.dumps(data).encode())

    def _rehash(self, data: dict[str, Any]) -> None:
        """The hashes of configuration and tokenizer, where the mutant has any."""
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            made, ids = config_hash(config), tokenizer_hash(tokenizer)
            plan = json.loads((self.folder / manifest.PLAN).read_bytes())
            plan["model"]["config_hash"], plan["tokenizer_hash"] = made, ids
            profile = json.loads((self.folder / manifest.PROFILE).read_bytes())
            profile["shape"]["config_hash"], profile["tokenizer_hash"] = made, ids
        except BaseException:  # whatever transformers makes of it: there is nothing to hash
            return
        if made == data["base_model"]["config_hash"] and ids == data["tokenizer_hash"]:
            return
        data["base_model"]["config_hash"], data["tokenizer_hash"] = made, ids
        self.put(manifest.PLAN, json.dumps(plan).encode())
        self.put(manifest.PROFILE, json.dumps(profile).encode())


def prepare(folder: Path) -> Callable[[Random, Path], str]:
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    benches = {weights: Bench(folder, weights) for weights in FORMAT}
    for bench in benches.values():
        assert attempt(bench) == "loaded"

    def trial(rng: Random, _: Path) -> str:
        bench = benches[rng.choices(list(FORMAT), list(FORMAT.values()))[0]]
        began = time.monotonic()
        try:
            name = bench.mutant(rng)
            ending = attempt(bench)
        finally:
            bench.restore()
        took = time.monotonic() - began
        assert took < SECONDS, f"{name}: {took:.1f} s until it was {ending}"
        return ending

    return trial


def attempt(bench: Bench) -> str:
    """How the bundle as it lies there ends."""
    try:
        model, tokenizer = kvcompress.load(bench.folder)
    except KVCompressError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 10_000, f"not one line: {text[:2000]!r}"
        return "refused"
    try:
        run(model, tokenizer)
    except KVCompressError as error:  # such as a tokenizer that knows more than the model does
        return refusal(error, KVCompressError, "loaded, then told")
    return "loaded"


def run(model: Any, tokenizer: Any) -> None:
    """A prompt, a few tokens, a generation.

    Raises:
        AssertionError: where a logit is not finite.
    """
    ids = (7 + 31 * torch.arange(PROMPT + STEPS))[None] % 256
    cache = new_cache(model)
    with torch.inference_mode():
        for part in ids.split([PROMPT, *[1] * STEPS], dim=1):
            logits = model(part, use_cache=True, **as_argument(cache)).logits
            assert bool(logits.isfinite().all()), "logits that are not finite"
        text = tokenizer("A word.", return_tensors="pt")
        out = model.generate(text.input_ids, max_new_tokens=2)
    tokenizer.decode(out[0])
