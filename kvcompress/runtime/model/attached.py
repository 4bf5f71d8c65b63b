"""The record that a model with a plan carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams, Rotation
from kvcompress.runtime.names import forward_arguments

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

RECORD: Final = "_kvcompress_attached"


class Attached:
    """The changes that `attach` made to a model, so that `detach` can undo them.

    Args:
        kind: the model's class.
        wake: registers the attention function with transformers. A model may be unpickled in a
            process that never attached a plan, and calls it then. It is pickled by its name.

    Attributes:
        arguments: names of the arguments of the model's forward, in order.
        own: the plan and key constants of the KV heads that this process holds.
        before: the attention implementation that the model had.
        hooks: handles of the hooks to take away.
        rotations: of every layer, where the plan turns keys.
    """

    def __init__(
        self,
        kind: type[PreTrainedModel],
        plan: Plan,
        params: KVParams | None,
        before: str,
        wake: Callable[[], None],
    ) -> None:
        self.wake = wake
        self.plan, self.params, self.before = plan, params, before
        self.own = (plan, params)
        self.arguments = forward_arguments(kind)
        self.hooks: list[RemovableHandle] = []
        self.rotations: tuple[Rotation | None, ...] | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.wake()


def base_of(model: object) -> PreTrainedModel:
    """The transformers model inside of torch.compile's or PEFT's wrapper, or the model itself.

    Raises:
        UnsupportedModelError: for another wrapper, or PEFT's prompt learning, whose keys and values
            the compressed cache would never see.
    """
    from transformers import PreTrainedModel

    found, tuning = _unwrapped(model)
    if getattr(tuning, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"PEFT's {type(tuning).__name__} puts keys and values of its own into the cache, which "
            "the plan does not know; use LoRA or another method that changes weights"
        )
    if not isinstance(found, PreTrainedModel):
        raise UnsupportedModelError(
            f"a {type(model).__name__} is no transformers model; give the PreTrainedModel inside it"
        )
    return found


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """The model inside the wrappers of torch.compile and PEFT, and PEFT's configuration or None."""
    tuning = None
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "active_peft_config"):
            tuning, model = model.active_peft_config, model.get_base_model()
        else:
            return model, tuning


def record(model: object) -> Attached | None:
    """The record of a model, None where it has no plan."""
    found: Attached | None = _unwrapped(model)[0].__dict__.get(RECORD)
    return found


def set_record(model: PreTrainedModel, value: Attached) -> None:
    model.__dict__[RECORD] = value


def take_record(model: object) -> tuple[PreTrainedModel, Attached | None]:
    """The model inside its wrappers, and its record, which is removed from it."""
    inner = _unwrapped(model)[0]
    return inner, inner.__dict__.pop(RECORD, None)


def attached(model: object) -> tuple[Plan, KVParams | None] | None:
    """The plan and key constants that the model serves now, None without any."""
    found = record(model)
    return None if found is None else (found.plan, found.params)


def own_part(model: object) -> tuple[Plan, KVParams | None]:
    """The plan and key constants of the KV heads that this process holds, for new caches.

    Raises:
        KVCompressError: if no plan is attached.
    """
    found = record(model)
    if found is None:
        raise KVCompressError(
            f"{type(model).__name__} has no plan: call kvcompress.attach(model, plan) first"
        )
    return found.own


def device_mesh(model: PreTrainedModel) -> DeviceMesh | None:
    """The `DeviceMesh` over which transformers spread the model, None for one process."""
    return getattr(model, "_device_mesh", None)
