"""Tensor parallelism: each process holds a contiguous block of the KV heads, of the plan too.

transformers cuts the key projections column by column, so process `rank` of `size` computes the
KV heads ``[rank · H/size, (rank + 1) · H/size)`` and the query heads that read them. Heads are
scored and evicted one by one, so a process needs only its own heads' rules and key constants, and
`accounting` of the cut plan is what that process holds. Positions and row starts, a few bytes per
token, are held by every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from kvcompress.errors import UnsupportedModelError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan, PooledBudget
from kvcompress.quant.keystats import KVParams

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

# projections that make keys, fused ones too, and how transformers may cut them
_KEY_PROJECTIONS: Final = frozenset({"k_proj", "qkv_proj", "query_key_value", "qkv"})
_QUERY_PROJECTIONS: Final = _KEY_PROJECTIONS | {"q_proj", "q_b_proj"}
_WHOLE: Final = frozenset({"colwise_gather_output", "colwise_rep", "replicate"})


def mesh_of(
    model: PreTrainedModel, device_mesh: Callable[[PreTrainedModel], DeviceMesh | None]
) -> tuple[int, int]:
    """(rank, size) of this process among those that share the model's KV heads; (0, 1) for one.

    Args:
        device_mesh: gives the `torch.distributed.DeviceMesh` of a model, None for one process.

    Raises:
        UnsupportedModelError: where the processes share layers or a latent instead of heads.
    """
    mesh = device_mesh(model)
    if mesh is None:
        return 0, 1
    names = mesh.mesh_dim_names or ("tp",)
    if "pp" in names and mesh.size(names.index("pp")) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: a pipeline keeps other layers in each process, which the "
            "compressed cache does not follow; use tensor parallelism"
        )
    if "tp" not in names or mesh.size(names.index("tp")) == 1:
        return 0, 1
    cut = {name.rpartition(".")[2] for name, style in model.tp_plan.items() if style not in _WHOLE}
    keys, queries = cut & _KEY_PROJECTIONS, cut & _QUERY_PROJECTIONS
    if not queries:
        return 0, 1
    if not keys:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its tensor parallel plan cuts queries "
            f"({', '.join(sorted(queries))}) but not keys, so no process sees all attention to a "
            "token; load the model without tp_plan"
        )
    return mesh.get_local_rank(names.index("tp")), mesh.size(names.index("tp"))


def shard_plan(plan: Plan, rank: int, size: int) -> Plan:
    """The plan of process `rank` of `size`: its block of the heads of every layer.

    The model's `config_hash` stays that of the whole model; `target` names the block.

    Raises:
        UnsupportedModelError: where the heads cannot be dealt out evenly.
    """
    if size == 1:
        return plan
    shape = plan.model
    for name in ("kv_heads", "query_heads"):
        _share(getattr(shape, name), size, f"{shape.model_type}: {name}")
    if plan.scorer == "random":
        raise UnsupportedModelError(
            "the random scorer numbers the KV heads of the whole model, which a process of a "
            "tensor parallel model does not see; use another scorer"
        )
    if scorer(plan.scorer).across_heads or isinstance(plan.per_request, PooledBudget):
        raise UnsupportedModelError(
            f"the scorer {plan.scorer!r} or the plan's pooled budgets compare all KV heads, which "
            "a process of a tensor parallel model does not see; use another recipe"
        )
    local = _share(shape.kv_heads, size, f"{shape.model_type}: kv_heads")
    block = slice(rank * local, (rank + 1) * local)
    own = shape.model_copy(update={"kv_heads": local, "query_heads": shape.query_heads // size})
    return plan.model_copy(
        update={
            "model": own,
            "heads": tuple(heads[block] for heads in plan.heads),
            "predicted_loss": None,
            "predicted_recall_loss": None,
            "target": f"{plan.target}; KV heads {block.start} to {block.stop - 1} of "
            f"{shape.kv_heads}",
        }
    )


def shard_params(params: KVParams | None, rank: int, size: int) -> KVParams | None:
    """The key constants of the same block of heads; copies, so that the whole can be freed."""
    if params is None or size == 1:
        return params

    def block(tensor: torch.Tensor) -> torch.Tensor:
        local = _share(tensor.shape[0], size, "key constants: heads")
        return tensor[rank * local : (rank + 1) * local].clone()

    trained = {name: tuple(map(block, parts)) for name, parts in params.scorer.items()}
    moments = tuple(own.each(block) for own in params.moments)
    center, scale = (tuple(map(block, t)) for t in (params.k_center, params.k_scale))
    return KVParams(center, scale, trained, moments)


def _share(heads: int, size: int, what: str) -> int:
    if heads % size:
        raise UnsupportedModelError(
            f"{what} is {heads}, which {size} tensor parallel processes cannot share evenly; use a "
            f"number of processes that divides it"
        )
    return heads // size


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each attention layer of the model keeps its weights, and so its part of the cache."""
    devices = [model.device] * model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and weight is not None and weight.device.type != "meta":
            devices[index] = weight.device
    return devices
