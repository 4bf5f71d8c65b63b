"""Generating one token with a model that was just loaded.

Settings of a wrong type raise only when they are used, and finite weights may still overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from kvcompress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDS: Final = (7, 38, 69, 100)
# one token, that of the largest logit, whatever the model's generation_config.json says
_PLAIN: Final[dict[str, object]] = {
    "max_new_tokens": 1,
    "do_sample": False,
    "num_beams": 1,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def try_out(name: str, model: PreTrainedModel) -> None:
    """Generate one token.

    Raises:
        UnsupportedModelError: where its logits are not numbers.
    """
    import torch

    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    ids = torch.tensor([_IDS], device=model.device) % max(1, weight.shape[0])
    with torch.inference_mode():
        output = cast(Any, model.generate)(ids, attention_mask=torch.ones_like(ids), **_PLAIN)
    logits = output.logits[0]
    if bool(logits.isnan().any()) or bool(logits.isposinf().any()):
        raise UnsupportedModelError(
            f"{name}: its logits overflow: weights or settings are damaged; give a complete model"
        )
