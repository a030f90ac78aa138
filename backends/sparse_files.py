"""Read a written file back and find every sparse weight of the program in it, zero for zero.

A file holds a weight as it is or transposed, beside others in one constant or in pieces, its
integers shifted or two to a byte. In all these forms each output's row is there as it was, and is
looked for by its numbers: a row that is found has its zeros where the program has them. A filter
whose window was rearranged has no such rows; of it the constants under its name must hold the same
numbers besides zeros, each as often as the program or a whole multiple of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from planish.backends.base import SparseInFile
from planish.ir.errors import VerificationError
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout

if TYPE_CHECKING:
    import onnx

# Integers with a sign are written without one and the other way round: by 2^7, or 2^3 of 4 bits.
_SHIFTS = (0, 128, -128, 8, -8)


def sparse_in_file(program: Program, path: Path) -> tuple[SparseInFile, ...]:
    """Find the sparse weights of a program in a file that was made of it.

    Args:
        program: which constants claim a layout.
        path: an ONNX file; what it keeps beside itself lies in the same folder.

    Returns:
        One entry for each claim, in the order of the claims.

    Raises:
        VerificationError: a weight is not there with its zeros; names it and its layout.
    """
    wanted = {
        name: (layout, value)
        for name, layout in program.layouts.items()
        if isinstance(value := program.constants.get(name), Tensor)
    }
    if not wanted:
        return ()
    rows = {name: _Rows(value, layout) for name, (layout, value) in wanted.items()}
    owned: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in wanted}
    names = sorted(map(str, program.constants), key=len, reverse=True)
    for stored, array in _constants(path):
        owner = next((name for name in names if stored.startswith(name)), None)
        if owner in rows and array.ndim > 1:
            rows[owner].look(stored, array)
            owned[owner].append((stored, array))
    if any(sought.missing for sought in rows.values()):  # beside others, under another's name
        for stored, array in _constants(path):
            for sought in rows.values():
                sought.look(stored, array)
    return tuple(_verdict(n, rows[n], owned[n], layout, path) for n, (layout, _) in wanted.items())


def _verdict(
    name: str, rows: _Rows, owned: list[tuple[str, np.ndarray]], layout: SparseLayout, path: Path
) -> SparseInFile:
    if not rows.missing:
        return SparseInFile(name, layout, tuple(dict.fromkeys(rows.found_in)), exact=True)
    # Rows that are there in part are no rearranged filter: some were changed.
    if not rows.found_in and owned and rows.is_rearranged([array for _, array in owned]):
        return SparseInFile(name, layout, tuple(stored for stored, _ in owned), exact=False)
    shares = [(stored, float((array == 0).mean())) for stored, array in owned]
    held = ", ".join(f"{stored} ({share:.1%} zeros)" for stored, share in shares) or "nothing"
    raise VerificationError(
        f"@{name} is {layout}, and the file does not keep that: {rows.missing} of {rows.count} of "
        f"its rows are not in it, and under its name it holds {held}",
        where=path.name,
        hint="this is a defect of planish: report it with the model",
    )


class _Rows:
    """The rows of a weight that are still to be found in a file."""

    def __init__(self, value: Tensor, layout: SparseLayout):
        axis = 1 if layout.axis is not None and layout.axis % value.dim() == 0 else 0
        array = _plain(value.detach().cpu().float().numpy())  # integers of 8 bits are exact, too
        self._integers = not value.is_floating_point()
        self._filter = array if array.ndim > 2 else None
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        self.length = rows.shape[1]
        self._left = {row.tobytes() for row in rows}
        self.count = len(self._left)
        self._known = frozenset(self._left)
        self._zero = np.zeros(self.length, np.float32).tobytes()  # is found in anything
        self.found_in: list[str] = []

    @property
    def missing(self) -> int:
        """How many different rows have not been found."""
        return len(self._left)

    def is_rearranged(self, arrays: list[np.ndarray]) -> bool:
        """Whether constants hold the numbers of a filter besides zeros, in another order."""
        if self._filter is None or any((a.dtype.kind in "iu") != self._integers for a in arrays):
            return False
        held = np.sort(np.concatenate([a[a != 0].astype(np.float32) for a in arrays]))
        for shift in _SHIFTS if self._integers else (0,):
            own = np.sort(self._filter + np.float32(shift), axis=None)
            own = own[own != 0]
            times, rest = divmod(len(held), max(len(own), 1))
            if times and not rest and np.array_equal(held, np.repeat(own, times)):
                return True
        return False

    def look(self, stored: str, array: np.ndarray) -> None:
        """Find rows in a constant of the file."""
        integers = array.dtype.kind in "iu"
        if integers != self._integers or array.ndim < 2 or not self._left:
            return
        for rows in self._forms(array):
            for shift in _SHIFTS if integers else (0,):
                found = {(row + np.float32(shift)).tobytes() for row in rows} & self._known
                self._left -= found
                if found - {self._zero}:
                    self.found_in.append(stored)
                    break  # the other shifts would find chance alone
                if not self._left:
                    return

    def _forms(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """A constant as rows ``[.., length]``, in each way that gives rows of this length."""
        for axis, size in enumerate(array.shape):
            if size and array.size // size == self.length:
                yield _plain(np.moveaxis(array, axis, 0).reshape(size, -1).astype(np.float32))
            elif array.ndim == 2 and array.size > size * self.length:  # a block was filled up
                rows = array if axis == 0 else array.T
                if bool((rows[:, self.length :] == 0).all()):
                    yield _plain(rows[:, : self.length].astype(np.float32))
        if array.ndim == 3 and array.dtype == np.uint8:  # as MatMulNBits reads it
            flat = array.reshape(len(array), -1)
            halves = np.stack([flat & 15, flat >> 4], -1).reshape(len(array), -1)
            for codes in (flat, halves):
                if codes.shape[1] >= self.length:
                    yield codes[:, : self.length].astype(np.float32)


def _plain(array: np.ndarray) -> np.ndarray:
    """Without negative zeros, row by row in memory."""
    made: np.ndarray = np.ascontiguousarray(array) + np.float32(0)
    return made


def _constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The constants of a file one after another, so that one is in memory at a time."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    model = onnx.load(str(path), load_external_data=False)
    for tensor in _initializers(model):
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(path.parent))
        yield tensor.name, _array(tensor)
        tensor.ClearField("raw_data")


def _initializers(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All of them, those of branches included."""
    pending: list[Any] = [model.graph]
    while pending:
        graph = pending.pop()
        yield from graph.initializer
        for node in graph.node:
            pending += [a.g for a in node.attribute if a.HasField("g")]


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    """Numbers that numpy knows: 4-bit integers in bytes, halves of either kind in float32."""
    from onnx import TensorProto, numpy_helper

    array: np.ndarray = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.INT4:
        return array.astype(np.int8)
    if tensor.data_type == TensorProto.UINT4:
        return array.astype(np.uint8)
    if tensor.data_type in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        return array.astype(np.float32)
    return array
