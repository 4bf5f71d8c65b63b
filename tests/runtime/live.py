"""Bytes of tensors that are alive at once, counted operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations within it make, until nothing holds them.

    What exists before is not counted, nor what one operation makes and frees inside itself.

    Args:
        known: tensors that exist already.

    Attributes:
        peak: most bytes that were alive after any operation.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.at_peak = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        bytes_now = self.now()
        if bytes_now > self.peak:
            self.peak, self.at_peak = bytes_now, str(func)
        return result

    def now(self) -> int:
        """Bytes that are alive."""
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        return sum(size for _, size in self._live.values())


def _tensors(result: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor))
