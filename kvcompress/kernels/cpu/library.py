"""The compiled kernels: found beside this file, loaded without torch's headers, checked once."""

from __future__ import annotations

import ctypes
from ctypes import CDLL, POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.kernels.cpu.layout import (
    DTYPES,
    STRUCTS,
    CodesStruct,
    CompactionStruct,
    LayerStruct,
    StepStruct,
)

if TYPE_CHECKING:
    from torch import Tensor

_HERE: Final = Path(__file__).parent
ISAS: Final = ("avx512-vnni", "avx2", "portable")


@dataclass(frozen=True)
class Library:
    """The loaded kernels.

    Attributes:
        path: the file that was loaded.
        threads: whether work can be spread over torch's threads.
    """

    path: Path
    threads: bool
    _library: CDLL

    @property
    def isa(self) -> str:
        """The instruction set in use, of `ISAS`."""
        name: bytes = self._library.kvc_isa_name()
        return name.decode()

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16 numbers as they are (AVX512-BF16)."""
        return bool(self._library.kvc_multiplies_bf16())

    def use_isa(self, name: str) -> None:
        """Use another instruction set from now on; for tests and measurements.

        Raises:
            ValueError: where this processor lacks it.
        """
        if self._library.kvc_use_isa(name.encode()):
            raise ValueError(f"this processor cannot run {name!r} kernels")

    def decode(self, layer: LayerStruct, step: StepStruct) -> None:
        """One decode step of a layer, see src/decode.c.

        Raises:
            MemoryError: nothing is changed then.
        """
        if self._library.kvc_decode(byref(layer), byref(step)):
            raise MemoryError("no memory for the scratch arrays of a decode step")

    def leaving(
        self, layer: LayerStruct, position: ctypes.Array[c_int32], flags: ctypes.Array[c_int32]
    ) -> None:
        """Position and class flags of the tokens that the next step pushes out of the exact."""
        if self._library.kvc_leaving(byref(layer), position, flags):
            raise MemoryError("no memory for the rows of a decode step")

    def compact(self, keys: CodesStruct, values: CodesStruct, told: CompactionStruct) -> None:
        """Encode chosen tokens of a prompt into their slots, see src/compact.c."""
        self._library.kvc_compact(byref(keys), byref(values), byref(told))

    def linear8(
        self, x: Tensor, weight: Tensor, scale: Tensor, row_sum: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``[M, out]``: ``(x Wᵀ) · scale + bias``, in the dtype of `x`.

        Args:
            x: ``[M, in]`` float32, bfloat16 or float16; rounded to 16 bits of each row's range.
            weight: ``[out, in]`` int8; row_sum: ``[out]`` int32 sums of its rows.
            scale, bias: ``[out]`` float32.

        Raises:
            MemoryError: where there is none for the scratch arrays.
        """
        import torch

        x = x if x.stride(-1) == 1 else x.contiguous()
        outer, inner = weight.shape
        y = x.new_empty(x.shape[0], outer)
        failed = self._library.kvc_linear8(
            *(weight.data_ptr(), outer, inner, scale.data_ptr(), row_sum.data_ptr()),
            *(x.data_ptr(), DTYPES[str(x.dtype)[6:]], x.shape[0], x.stride(0)),
            None if bias is None else bias.data_ptr(),
            *(y.data_ptr(), outer, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("no memory for the scratch arrays of a product with int8 weights")
        return y

    def linear16(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[M, out]``: ``x Wᵀ + bias``, summed as floats, in the dtype of `x`.

        Args:
            x: ``[M, in]``; weight: ``[out, in]``; bias: ``[out]``; all bfloat16 or all float16.

        Raises:
            MemoryError: where there is none for the scratch arrays.
        """
        import torch

        x = x if x.stride(-1) == 1 else x.contiguous()
        outer, inner = weight.shape
        y = x.new_empty(x.shape[0], outer)
        wide = None if bias is None else bias.float()
        failed = self._library.kvc_linear16(
            *(weight.data_ptr(), outer, inner),
            *(x.data_ptr(), DTYPES[str(x.dtype)[6:]], x.shape[0], x.stride(0)),
            None if wide is None else wide.data_ptr(),
            *(y.data_ptr(), outer, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("no memory for the scratch arrays of a product with 16-bit weights")
        return y


@dataclass(frozen=True)
class Absent:
    """Why there are no compiled kernels."""

    reason: str


@cache
def _found() -> Library | Absent:
    paths = [_HERE / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return Absent(
            "the C kernels were not built: install kvcompress where a C compiler is at hand"
        )
    return _opened(path)


def use(path: Path) -> None:
    """Use kernels that were built elsewhere; before any other, for tests.

    Raises:
        RuntimeError: where they cannot be loaded.
    """
    global _found
    found = _opened(path)
    if isinstance(found, Absent):
        raise RuntimeError(found.reason)
    _found = cache(lambda: found)


def _opened(path: Path) -> Library | Absent:
    try:
        library = CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return Absent(f"{path.name} cannot be loaded: {error}")
    sizes = (c_int64 * len(STRUCTS))()
    library.kvc_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in STRUCTS]:
        return Absent(f"{path.name} was built from other sources; install kvcompress again")
    return Library(path, _share_threads(library), library)


def library() -> Library | None:
    """The kernels, None where `why_not` gives a reason."""
    found = _found()
    return found if isinstance(found, Library) else None


def why_not() -> str | None:
    """Why there are no kernels; None where there are."""
    found = _found()
    return found.reason if isinstance(found, Absent) else None


def _declare(library: CDLL) -> None:
    library.kvc_isa_name.restype = c_char_p
    library.kvc_use_isa.argtypes = [c_char_p]
    library.kvc_decode.argtypes = [POINTER(LayerStruct), POINTER(StepStruct)]
    library.kvc_leaving.argtypes = [POINTER(LayerStruct), POINTER(c_int32), POINTER(c_int32)]
    library.kvc_compact.argtypes = [
        *(POINTER(CodesStruct), POINTER(CodesStruct), POINTER(CompactionStruct))
    ]
    library.kvc_compact.restype = None
    library.kvc_use_openmp.argtypes = [c_void_p]
    library.kvc_use_openmp.restype = None
    library.kvc_sizes.argtypes = [POINTER(c_int64)]
    library.kvc_sizes.restype = None
    library.kvc_linear8.argtypes = [
        *(c_void_p, c_int64, c_int64, c_void_p, c_void_p),  # the weight
        *(c_void_p, c_int32, c_int64, c_int64, c_void_p),  # the activations and the bias
        *(c_void_p, c_int64, c_int32),
    ]
    library.kvc_linear16.argtypes = [
        *(c_void_p, c_int64, c_int64),
        *(c_void_p, c_int32, c_int64, c_int64, c_void_p),
        *(c_void_p, c_int64, c_int32),
    ]


def _share_threads(library: CDLL) -> bool:
    """Give the kernels the entry point of the OpenMP runtime that torch itself uses."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if not (folder / name).exists():
            continue
        try:
            entry = CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        library.kvc_use_openmp(ctypes.cast(entry, c_void_p))
        return True
    return False
