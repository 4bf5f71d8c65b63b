"""From a bundle to a model that generates with the compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.bundle.read import Bundle, load_weights, open_bundle
from kvcompress.errors import BundleError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.checkpoint.compute import Dtype
    from kvcompress.checkpoint.load import DeviceMap


def load(
    bundle: Path | str, device_map: DeviceMap = None, dtype: torch.dtype | Dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Check a bundle, load it and attach its plan; `model.generate` then works as usual.

    On the CPU int8 and 16-bit weights are served by the compiled kernels where there are any, see
    `kvcompress doctor`.

    Args:
        device_map: as in `from_pretrained`; None is the CPU.
        dtype: of the weights that are not quantized; None is what the bundle says. A word is what
            16-bit weights are computed in: ``auto`` is float32 where the device multiplies 16 bits
            slower, which suits long prompts, and leaves packed weights as they are.

    Raises:
        BundleError: where the bundle is damaged, foreign or from a newer version; where a word
            names another dtype for packed weights.
    """
    from kvcompress.checkpoint.compute import computing_in
    from kvcompress.runtime.hf.attach import attach

    checked = open_bundle(bundle)
    word = dtype if isinstance(dtype, str) else "stored"
    model = load_weights(checked, device_map, None if isinstance(dtype, str) else dtype)
    try:
        model = computing_in(model, word, str(bundle))
    except UnsupportedModelError as error:
        raise BundleError(str(error)) from None
    serve(model, checked)
    return attach(model, checked.plan, checked.params), checked.tokenizer


def serve(model: PreTrainedModel, bundle: Bundle | None = None) -> None:
    """Let the CPU's fast products serve the weights, where there are any.

    Args:
        bundle: what the weights came from; None where they are not packed.
    """
    from kvcompress.kernels.cpu.library import library
    from kvcompress.kernels.linear.bits16 import serve_16_bit
    from kvcompress.kernels.linear.int8 import serve_bitsandbytes

    packed = bundle is not None and bundle.manifest.weights.format == "int8"
    if packed and library() is not None:
        serve_bitsandbytes(model)
    serve_16_bit(model)
