"""The only calls of transformers' loaders. They read files of this machine and run no code of a
model's own.

A damaged file makes transformers raise an error of any kind; here it becomes one line that names
the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kvcompress.checkpoint import settings, tensors
from kvcompress.checkpoint.packed import check_packed, import_bitsandbytes
from kvcompress.checkpoint.trial import try_out
from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.strict import shown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# where the weights go, as `from_pretrained` takes it; None is the CPU
DeviceMap: TypeAlias = "str | torch.device | dict[str, str | int | torch.device] | None"

# everything of a model on the Hub but its weights, and nothing that Python would run
_SMALL: Final = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*")
_SMALL_TOO: Final = ("USE_POLICY*", "README.md")
_MESSAGE: Final = 240


@dataclass(frozen=True)
class Checkpoint:
    """A model whose settings were looked at.

    Attributes:
        name: what the user called it: a directory, a .gguf file or a name on the Hub.
        folder: where its files are; of a name on the Hub the weights may still be missing.
        settings: its config.json; empty for a .gguf file.
        gguf: name of the .gguf file in the folder, which then holds everything.
    """

    name: str
    folder: Path
    settings: dict[str, object]
    gguf: str | None = None

    @property
    def place(self) -> dict[str, bool | str]:
        """Options for every loader of transformers: no network, no code of the model's own."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"trust_remote_code": False, "local_files_only": True, **gguf}


def find(model: Path | str) -> Checkpoint:
    """A model directory, a .gguf file, or a name on the Hub.

    Raises:
        UnsupportedModelError: if there is no such model, or its settings are refused.
    """
    name, path = str(model), Path(model)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf(name, path)
    if path.exists():
        if not (path / settings.CONFIG).is_file():
            what = "no config.json in it" if path.is_dir() else "a file"
            files = sorted(path.glob("*.gguf")) if path.is_dir() else []
            give = f"or {files[0]}" if files else "or a .gguf file"
            raise UnsupportedModelError(f"{name}: {what}; give a model directory {give}")
        return Checkpoint(name, path, settings.vetted(path))
    if path.is_absolute() or name.count("/") != 1 or name[0] in ".~":
        raise UnsupportedModelError(
            f"{name}: no such directory; give a model directory or a hub name"
        )
    folder = _fetch(name, [*_SMALL, *_SMALL_TOO])
    return Checkpoint(name, folder, settings.vetted(folder))


def _gguf(name: str, path: Path) -> Checkpoint:
    if find_spec("gguf") is None:
        raise UnsupportedModelError(
            f"{name}: a .gguf file is read by the gguf package; pip install 'kvcompress[gguf]'"
        )
    return Checkpoint(name, path.parent, {}, path.name)


def _fetch(name: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    with reading(name, "files"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def load_config(found: Checkpoint) -> PretrainedConfig:
    """Its configuration, an attribute for every key.

    Raises:
        UnsupportedModelError: if it cannot be read, or a key would replace a method.
    """
    from transformers import AutoConfig

    with reading(found.name, settings.CONFIG):
        config: PretrainedConfig = AutoConfig.from_pretrained(found.folder, **found.place)
        if found.gguf is not None:
            settings.check_config(found.folder / found.gguf, config.to_dict())
        _refuse_shadows(found, config)
        return config


def _refuse_shadows(found: Checkpoint, config: PretrainedConfig) -> None:
    """Refuse keys that would replace a method: a configuration becomes attributes of its class."""
    parts = [found.settings, *(v for v in found.settings.values() if isinstance(v, dict))]
    for part in parts:
        for key in part:
            if key.startswith("__") or callable(getattr(type(config), key, None)):
                raise UnsupportedModelError(
                    f"{found.name}: config.json has a key {shown(key)!r}, which names no setting; "
                    "leave it out"
                )


def load_tokenizer(found: Checkpoint, **options: object) -> PreTrainedTokenizerBase:
    """Its tokenizer; `options` are further ones of `from_pretrained`.

    Raises:
        UnsupportedModelError: if it cannot be read.
    """
    from transformers import AutoTokenizer

    with reading(found.name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            found.folder, **found.place, **options
        )
        # settings of a wrong type raise only when they are used
        ids = tokenizer("A word.", return_tensors="pt").input_ids[0]
        if not len(ids):
            raise UnsupportedModelError(
                f"{found.name}: its tokenizer makes no token of a text; give a complete model"
            )
        tokenizer.decode(ids)
        return tokenizer


def build(found: Checkpoint, config: PretrainedConfig, **options: object) -> PreTrainedModel:
    """The architecture with made-up weights, on the default device.

    Raises:
        UnsupportedModelError: if it is not a causal language model, or cannot be built.
    """
    from transformers import AutoModelForCausalLM

    with reading(found.name, "architecture"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=False, **options
        )
        return model


def load_model(
    found: Checkpoint,
    config: PretrainedConfig,
    *,
    exact: bool = False,
    tried: bool = True,
    **options: object,
) -> PreTrainedModel:
    """The model with its weights: all of them there, of their shapes, and finite.

    Args:
        exact: refuse tensors that the model does not have, too.
        tried: generate one token before the model is handed out; off where no forward may come
            before a save.
        options: further ones of `from_pretrained`.

    Raises:
        UnsupportedModelError: naming the tensor that is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder, names = found.folder, [found.gguf] if found.gguf else []
    if not names:
        names = tensors.weight_files(folder)
        if folder != Path(found.name):
            folder = _fetch(found.name, names, revision=folder.name)
        tensors.check_files(found.name, folder, names)
    with torch.device("meta"):
        tensors.check_size(found.name, [folder / file for file in names], build(found, config))
    method, config = _unpacked(config)
    if method == "bitsandbytes" or "quantization_config" in options:
        import_bitsandbytes()
    what = f"weights, which {method} packed," if method else "weights"
    if found.gguf:
        options = {**_gguf_options(found, options), **options}
    options = {"dtype": "auto", "device_map": "cpu", **options}
    with reading(found.name, what):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=None if found.gguf else True,
            output_loading_info=True,
            **found.place,
            **options,
        )
    model, report = loaded
    tensors.check_report(found.name, report, exact)
    tensors.check_values(found.name, model)
    check_packed(found.name, model)
    ready: PreTrainedModel = model.eval()
    if tried and ready.can_generate():
        with reading(found.name, "settings of generation"):
            try_out(found.name, ready)
    return ready


def _unpacked(config: PretrainedConfig) -> tuple[str, PretrainedConfig]:
    """The method that packed the weights, and a copy of the configuration in which fp8 weights are
    unpacked while they load. Packed fp8 layers would run on kernels from the Hub."""
    config = copy.deepcopy(config)
    found = getattr(config, "quantization_config", None)
    packed = found if isinstance(found, dict) else {}
    method = packed.get("quant_method", "bitsandbytes") if packed else ""
    if method == "fp8":
        config.quantization_config = {**packed, "dequantize": True}
    return method, config


def _gguf_options(found: Checkpoint, options: dict[str, object]) -> dict[str, object]:
    """Options that unpack the file's blocks; packed ones would run on kernels from the Hub."""
    import torch
    import transformers

    if options.pop("quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{found.name}: a .gguf file is exported in 16 bits; give the model's own directory "
            "for another format"
        )
    if options.get("dtype") == "auto":
        options["dtype"] = torch.bfloat16
    made: dict[str, object] = {"dtype": torch.bfloat16}
    kind = getattr(transformers, "GgufConfig", None)  # releases without it always unpack
    return made if kind is None else {**made, "quantization_config": kind(dequantize=True)}


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Within the block, turn an error of transformers into one line.

    Raises:
        UnsupportedModelError: for any error inside but our own.
    """
    try:
        yield
    except KVCompressError:
        raise
    except Exception as error:
        raise _refusal(name, what, error) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by the tokenizers' Rust code
            raise
        raise _refusal(name, what, error) from None


def _refusal(name: str, what: str, error: BaseException) -> UnsupportedModelError:
    if "trust_remote_code" in str(error):  # transformers advises an option that we refuse
        return UnsupportedModelError(
            f"{name}: its {what} is code of the model's own, which is never run; give a model that "
            "transformers has"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = shown((lines or [type(error).__name__])[0], _MESSAGE)
    return UnsupportedModelError(
        f"{name}: cannot load the {what} ({reason}); give the directory of a complete model"
    )
