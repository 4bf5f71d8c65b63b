"""The model that an export starts from: a local directory or a name on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcompress.bundle.manifest import SUFFIXES
from kvcompress.errors import BundleError, UnsupportedModelError
from kvcompress.strict import load_yaml

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LEGAL: Final = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_LICENSE_KEYS: Final = ("license", "license_name", "license_link")
_FRONT_MATTER: Final = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A model that can be compressed, without its weights.

    Attributes:
        id: name on the Hub, or the directory's own name: where it lay is nobody's business.
        skeleton: the model on the meta device.
        legal: licence texts to hand on.
        license: the keys about the licence in the model's own card.
    """

    location: str
    id: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    legal: tuple[Path, ...]
    license: dict[str, Any]

    def load(self, device_map: Any, **options: Any) -> PreTrainedModel:
        """The model with its weights; `options` are further ones of `from_pretrained`.

        Raises:
            BundleError: if they cannot be read, or some of them are not there.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.location,
                device_map="cpu" if device_map is None else device_map,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise BundleError(
                f"{self.location}: its weights cannot be read ({_first_line(error)}); "
                "give a complete model in safetensors files"
            ) from None
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise BundleError(
                f"{self.location}: {min(report['missing_keys'])} is not among its weights; "
                "give a complete model"
            )
        ready: PreTrainedModel = model.eval()
        return ready


def find(model: Path | str) -> Source:
    """Read everything about the model but its weights.

    Raises:
        BundleError: if it cannot be found, has no tokenizer or is quantized already.
        UnsupportedModelError: if it is not a causal language model that the runtime serves.
    """
    from transformers import AutoConfig, AutoTokenizer

    location = str(model)
    _check_location(location)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BundleError(
            f"{location}: no model and tokenizer can be read ({_first_line(error)}); give a "
            "directory that save_pretrained made, or a name on the Hub"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise BundleError(
            f"{location}: its weights are quantized already; give the model in 16 or 32 bits"
        )
    folder = _small_files(location)
    legal = {path for pattern in _LEGAL for path in folder.glob(pattern)} if folder else set()
    return Source(
        location=location,
        id=Path(location).resolve().name if Path(location).is_dir() else location,
        config=config,
        tokenizer=tokenizer,
        skeleton=_skeleton(location, config),
        legal=tuple(sorted(path for path in legal if path.suffix in SUFFIXES and path.is_file())),
        license=_license(folder / "README.md") if folder else {},
    )


def _skeleton(location: str, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from kvcompress.runtime.hf.attach import check

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except ValueError as error:
        reason = _first_line(error)
        raise UnsupportedModelError(f"{location}: not a causal language model ({reason})") from None
    check(model)
    return model


def _check_location(location: str) -> None:
    """Spare a path that does not exist a round of questions to the Hub."""
    path = Path(location)
    if path.exists() and not (path / "config.json").is_file():
        raise BundleError(f"{location}: no config.json in it; give a model directory")
    if not path.exists() and (location.count("/") > 1 or location[:1] in "./~"):
        raise BundleError(f"{location}: no such directory; say where the model is with --model")


def _small_files(location: str) -> Path | None:
    """Where the model's card and licence lie; None where the Hub cannot be asked for them."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, allow_patterns=[*_LEGAL, "README.md"]))
    except (LocalEntryNotFoundError, OSError):
        return None


def _license(card: Path) -> dict[str, Any]:
    """``license``, ``license_name`` and ``license_link`` of a model card, where it has them."""
    try:
        found = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
        data = load_yaml(found[1])[0] if found else None
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: str(data[key]) for key in _LICENSE_KEYS if key in data}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
