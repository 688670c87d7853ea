"""Weights prepared for the C products when a model is loaded: what `linear` takes beside plain tensors.

A prepared weight knows its shape and dtype (that of activations), multiplies, and gives rows back for an embedding
that is the head as well. PackedWeight holds the elements as they are, in the order the C kernel reads them
(kernels/native/packed.c), QuantizedWeight (kernels/quantized_weight.py) codes of fewer bits. Another way to keep them
is another class with the same methods, another `kind` of NativeWeight and another case in kernels/native/weight.c.
Products have one order of sums per element whatever the rows, so they serve deterministic runs as well.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.huge_pages import empty_in_huge_pages
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER

_PACK = (INT, POINTER, INT64, INT64, INT64, POINTER, INT)
_MULTIPLY = (POINTER, POINTER, INT64, POINTER, POINTER, INT64, INT64, INT)
_UNPACK = (POINTER, POINTER, INT64, POINTER, INT)
PACKED = 0
LEAST_COLUMNS = 8  # narrower weights stay tensors: a panel has 32 columns


class NativeWeight(ctypes.Structure):
    """Mirror of Weight in kernels/native/weight.h. Pointers are not owned."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("columns", INT64),
        ("inner", INT64),
        ("lead", INT64),
        ("data", POINTER),
        ("scales", POINTER),
        ("bias", POINTER),
    )


class PreparedWeight(ABC):
    """A [columns, inner] weight in a form of its own. native: its struct, whose pointers live as long as the weight."""

    shape: tuple[int, int]
    dtype: torch.dtype
    native: NativeWeight
    nbytes: int
    device = torch.device("cpu")

    def __init__(self, library: NativeLibrary) -> None:
        self._multiply = library.function("shoal_multiply", _MULTIPLY)

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None, *, deterministic: bool) -> torch.Tensor:
        """x w^T + bias, a new [rows, columns]. x: [rows, inner] on the weight's device; bias: [columns], contiguous.

        deterministic: a row's sums have one order whatever the other rows (in C they have always). Raises ValueError
        when dtypes differ.
        """
        self.check(x_MK, bias)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        y_MN = torch.empty((len(x_MK), self.shape[0]), dtype=self.dtype)
        self._multiply(
            ctypes.byref(self.native), x_MK.data_ptr(), x_MK.stride(0), None if bias is None else bias.data_ptr(),
            y_MN.data_ptr(), self.shape[0], len(x_MK), torch.get_num_threads(),
        )  # fmt: skip
        return y_MN

    def check(self, x_MK: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raise ValueError when dtypes differ."""
        assert x_MK.shape[1] == self.shape[1], (x_MK.shape, self.shape)
        if x_MK.dtype != self.dtype or (bias is not None and bias.dtype != self.dtype):
            theirs = "none" if bias is None else bias.dtype
            raise ValueError(f"linear needs one dtype; x is {x_MK.dtype}, weight {self.dtype}, bias {theirs}")

    @abstractmethod
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows of these numbers, of `dtype`: [*ids.shape, inner]. ids: int64."""


Weight = torch.Tensor | PreparedWeight


class RoundedWeight(PreparedWeight):
    """A weight [columns, inner] of fewer bits, or a stack of them [count, columns, inner], made zero and filled slab by
    slab while float values arrive.
    """

    @abstractmethod
    def put(self, first: int, values: torch.Tensor) -> None:
        """Round columns [first, first + count) of one weight.

        values: [count, inputs], any float type, any device: from the beginning of the group that the first input held
        lies in to the end of that of the last, or of the whole weight; so that scales are those of the whole weight.
        """

    @abstractmethod
    def unstacked(self) -> "Sequence[RoundedWeight]":
        """The weights of a stack, sharing its memory."""


class PackedWeight(PreparedWeight):
    """The elements of a tensor, in panels of 32 columns. weight: [columns, inner] on the CPU; it is copied."""

    def __init__(self, library: NativeLibrary, weight: torch.Tensor) -> None:
        super().__init__(library)
        columns, inner = weight.shape
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.shape, self.dtype, code = (columns, inner), weight.dtype, DTYPE_CODES[weight.dtype]
        self.nbytes = library.function("shoal_packed_bytes", (INT, INT64, INT64), INT64)(code, columns, inner)
        self._data = empty_in_huge_pages([self.nbytes // weight.element_size()], weight.dtype)
        library.function("shoal_pack", _PACK)(
            code, weight.data_ptr(), weight.stride(0), columns, inner, self._data.data_ptr(), torch.get_num_threads()
        )
        self._unpack_rows = library.function("shoal_unpack_rows", _UNPACK)
        self.native = NativeWeight(PACKED, code, columns, inner, 0, self._data.data_ptr())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight."""
        ids = ids.contiguous()
        out = torch.empty((*ids.shape, self.shape[1]), dtype=self.dtype)
        self._unpack_rows(
            ctypes.byref(self.native), ids.data_ptr(), ids.numel(), out.data_ptr(), torch.get_num_threads()
        )
        return out


def embedding_rows(weight: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding table: [*ids.shape, inner], new. ids: any shape, int64, within the table."""
    return weight.rows(ids) if isinstance(weight, PreparedWeight) else torch.nn.functional.embedding(ids, weight)
