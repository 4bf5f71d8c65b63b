"""A .gguf file, or a directory in fp8, as a plain model directory in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.checkpoint.load import Checkpoint, load_model
from kvcompress.checkpoint.settings import vetted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# quantizations that transformers can undo while it loads, on any device
UNPACKED: Final = frozenset(("fp8",))
_SHARD: Final = "5GB"


def is_unpacked(found: Checkpoint, config: PretrainedConfig) -> bool:
    """Whether loading this model unpacks its weights to 16 bits."""
    packed = getattr(config, "quantization_config", None)
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    return found.gguf is not None or method in UNPACKED


def unpack(
    found: Checkpoint, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Checkpoint:
    """Write the model as one that any loader reads.

    Raises:
        UnsupportedModelError: as `load_model`.
    """
    model = load_model(found, config, tried=False)
    model.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
    return Checkpoint(str(folder), folder, vetted(folder))
