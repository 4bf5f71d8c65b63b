"""Checks of a model directory's JSON files, made before transformers reads them.

transformers obeys many keys of a config.json. Some make it fetch and run code (an attention kernel
by the name of its repository), some replace its own methods, some make it build without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kvcompress.errors import UnsupportedModelError
from kvcompress.strict import NotStrictError, load_json, read_bytes, shown

CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
INDEX: Final = "model.safetensors.index.json"
CONFIG_BYTES: Final = 2**24  # some carry a label for every class
INDEX_BYTES: Final = 2**26
# bytes that each may have; a tokenizer.json is bounded and left to its own parser
_LIMITS: Final = {
    CONFIG: CONFIG_BYTES,
    "generation_config.json": CONFIG_BYTES,
    "tokenizer_config.json": CONFIG_BYTES,
    "special_tokens_map.json": CONFIG_BYTES,
    "added_tokens.json": CONFIG_BYTES,
    INDEX: INDEX_BYTES,
}
_TOKENIZER_BYTES: Final = 2**28

# anything else is a kernel that transformers would look for, on the Hub too
_IMPLEMENTATIONS: Final = {
    "attn_implementation": frozenset(("eager", "sdpa")),
    "experts_implementation": frozenset(("eager", "batched_mm", "grouped_mm")),
}
# keys that patch modules, name other weight files, or ask for kernels and other machines
_FOREIGN: Final = frozenset(
    ("distributed_config", "fusion_config", "kernel_config", "transformers_weights", "use_kernels")
)
# several times the largest published model
_BOUNDS: Final[dict[str, int]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1024),
    **dict.fromkeys(("prompt_lookup_num_tokens", "num_assistant_tokens"), 1024),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), 2**24),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 2**24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 1024),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_rope_head_dim"), 4096),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**17),
    **dict.fromkeys(("intermediate_size", "n_inner", "moe_intermediate_size"), 2**20),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**14),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 2**24),
    **dict.fromkeys(("sliding_window", "num_kv_shared_layers"), 2**24),
}
# quantizations whose loading fetches no kernel from the Hub; fp8 is unpacked while it is loaded
QUANTIZED: Final = frozenset(("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq"))


def vetted(folder: Path) -> dict[str, object]:
    """The config.json of a model directory, once all its settings were looked at.

    Raises:
        UnsupportedModelError: naming the file and what is refused.
    """
    if (folder / "custom_generate").exists():
        raise UnsupportedModelError(
            f"{folder}: brings code of its own (custom_generate), which is never run; remove that "
            "folder to use transformers' generate"
        )
    if (folder / ADAPTER).exists():
        raise UnsupportedModelError(
            f"{folder}: an adapter ({ADAPTER}), whose base lies elsewhere; merge the two and give "
            "the merged model"
        )
    found = {name: _read(folder / name, limit) for name, limit in _LIMITS.items()}
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.stat().st_size > _TOKENIZER_BYTES:
        raise UnsupportedModelError(f"{tokenizer}: larger than any tokenizer")
    config = found[CONFIG]
    if config is None:
        raise UnsupportedModelError(f"{folder}: no {CONFIG} in it; give a model directory")
    check_config(folder / CONFIG, config)
    _bounded(folder / "generation_config.json", found["generation_config.json"] or {})
    return config


def check_config(path: Path, config: dict[str, object]) -> None:
    """Refuse what a configuration must not say.

    Raises:
        UnsupportedModelError: naming the file and what is refused.
    """
    for check in CONFIG_CHECKS.values():
        check(path, config)


def _read(path: Path, limit_bytes: int) -> dict[str, object] | None:
    if not path.exists():
        return None
    try:
        value = load_json(read_bytes(path, limit_bytes), limit_bytes, ours=False)
    except NotStrictError as error:
        raise UnsupportedModelError(f"{path}: {error}; get the file again") from None
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path}: not a JSON object; get the file again")
    return value


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Every (key, value) of all objects in `value`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner  # keys are numbers in the labels of a configuration in memory
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for item in inner for leaf in _leaves(item)]
    return [value]


def _implementations(path: Path, config: dict[str, object]) -> None:
    for key, value in _entries(config):
        known = _IMPLEMENTATIONS.get(key.strip("_").removesuffix("_internal"))
        if known is None:
            continue
        for name in _leaves(value):
            if name is not None and name not in known:
                raise UnsupportedModelError(
                    f"{path}: its {key} asks for {shown(name)!r}, and kernels are not fetched; "
                    f"leave it out, or write one of {', '.join(sorted(known))}"
                )


def _no_foreign(path: Path, config: dict[str, object]) -> None:
    for key, value in _entries(config):
        if key in _FOREIGN and value:
            raise UnsupportedModelError(
                f"{path}: its {key} would change what is loaded, or from where; leave it out"
            )


def _bounded(path: Path, config: dict[str, object]) -> None:
    for key, value in _entries(config):
        most = _BOUNDS.get(key)
        if most is None:
            continue
        for number in _leaves(value):
            if number is None:
                continue
            counts = isinstance(number, int | float) and not isinstance(number, bool)
            if not counts or not -1 <= number <= most:  # type: ignore[operator]
                raise UnsupportedModelError(
                    f"{path}: its {key} is {shown(number, 40)}, expected a number up to {most}"
                )


def _no_remote_code(path: Path, config: dict[str, object]) -> None:
    """A leftover `auto_map` of a model that transformers has itself is not followed."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if config.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise UnsupportedModelError(
            f"{path}: {shown(kind)!r} is not an architecture of transformers but code of the "
            "model's own (auto_map), which is never run; give a model that transformers has"
        )


def _quantization(path: Path, config: dict[str, object]) -> None:
    for key, value in _entries(config):
        if key != "quantization_config" or value is None:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        if isinstance(value, dict) and method is None and _is_bitsandbytes(value):
            continue
        if not isinstance(method, str) or method not in QUANTIZED:
            raise UnsupportedModelError(
                f"{path}: its weights are quantized by {shown(method)!r}, which is not served "
                f"({', '.join(sorted(QUANTIZED))} are); give the model in 16 bits"
            )


def _is_bitsandbytes(value: dict[str, object]) -> bool:
    return any(value.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))


# by name, so that a test can take one away and see which configuration is then accepted
CONFIG_CHECKS: Final[dict[str, Callable[[Path, dict[str, object]], None]]] = {
    "implementations": _implementations,
    "foreign keys": _no_foreign,
    "bounds": _bounded,
    "remote code": _no_remote_code,
    "quantization": _quantization,
}
