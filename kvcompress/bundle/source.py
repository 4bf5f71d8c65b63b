"""The model that an export starts from: a local directory or a name on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcompress.bundle.manifest import SUFFIXES
from kvcompress.checkpoint import load as checkpoint
from kvcompress.checkpoint.load import Checkpoint, DeviceMap
from kvcompress.checkpoint.unpack import is_unpacked, unpack
from kvcompress.errors import BundleError, UnsupportedModelError
from kvcompress.strict import NotStrictError, load_yaml, read_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LEGAL: Final = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_LICENSE_KEYS: Final = ("license", "license_name", "license_link")
_CARD_BYTES: Final = 2**24
_LICENSE_LINE: Final = re.compile(r"^license(?:_name|_link)?:.*", re.MULTILINE)
_FRONT_MATTER: Final = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A model that can be compressed, without its weights.

    Attributes:
        id: name on the Hub, or the directory's own name without the folders above it, which a
            bundle must not reveal.
        skeleton: the model on the meta device, so without weights.
        legal: files with licence texts, which the bundle gets copies of.
        license: the keys about the licence in the model's own card.
    """

    location: str
    id: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    legal: tuple[Path, ...]
    license: dict[str, str]

    @property
    def is_unpacked(self) -> bool:
        """Whether loading the weights unpacks them, which takes long and yields 16 bits."""
        return is_unpacked(self.checkpoint, self.config)

    def in_16_bits(self, folder: Path) -> Source:
        """The same, of weights that were unpacked into `folder`.

        Raises:
            BundleError: as `load`.
        """
        with as_bundle_error():
            plain = unpack(self.checkpoint, self.config, self.tokenizer, folder)
            return replace(self, checkpoint=plain, config=checkpoint.load_config(plain))

    def load(self, device_map: DeviceMap, **options: Any) -> PreTrainedModel:
        """The model with its weights; `options` are further ones of `from_pretrained`.

        Raises:
            BundleError: if they cannot be read, or some of them are not there.
        """
        place = device_map or "cpu"
        with as_bundle_error():
            return checkpoint.load_model(
                self.checkpoint, self.config, tried=False, device_map=place, **options
            )


@contextmanager
def as_bundle_error() -> Iterator[None]:
    """Within the block, what is wrong with a model directory is reported as wrong with a bundle."""
    try:
        yield
    except UnsupportedModelError as error:
        raise BundleError(str(error)) from None


def find(model: Path | str) -> Source:
    """Read everything about the model but its weights.

    Raises:
        BundleError: if it cannot be found, has no tokenizer or is quantized already.
        UnsupportedModelError: if it is not a causal language model that the runtime serves.
    """
    location = str(model)
    with as_bundle_error():
        found = checkpoint.find(model)
        config = checkpoint.load_config(found)
        tokenizer = checkpoint.load_tokenizer(found)
    packed = getattr(config, "quantization_config", None) is not None
    if packed and not is_unpacked(found, config):
        raise BundleError(
            f"{location}: its weights are quantized already; give the model in 16 or 32 bits, "
            "in fp8, or a .gguf file"
        )
    legal = {path for pattern in _LEGAL for path in found.folder.glob(pattern)}
    return Source(
        location=location,
        id=Path(location).resolve().name if Path(location).exists() else location,
        config=config,
        tokenizer=tokenizer,
        checkpoint=found,
        skeleton=_skeleton(found, config),
        legal=tuple(sorted(path for path in legal if path.suffix in SUFFIXES and path.is_file())),
        license=_license(found.folder / "README.md"),
    )


def _skeleton(found: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from kvcompress.runtime.hf.attach import check

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{found.name}: {config.model_type} is not a causal language model"
        )
    with torch.device("meta"):
        model = checkpoint.build(found, config)
    check(model)
    return model


def _license(card: Path) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of a model card, where it has them."""
    try:
        found = _FRONT_MATTER.match(read_text(card, _CARD_BYTES))
        lines = _LICENSE_LINE.findall(found[1]) if found else []
        data, _ = load_yaml("\n".join(lines))
    except NotStrictError:
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: str(data[key]) for key in _LICENSE_KEYS if data.get(key) is not None}
