"""Write an ONNX file straight from the tensors' own memory.

``onnx.save`` builds the whole file as one Python object first: twice the weights in memory. Here
the small parts are serialized by protobuf and the weights are streamed between them, so the peak
is that of the program. The bytes depend on the model alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from planish.ir.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Field numbers of onnx.proto, shifted by the wire type "length-delimited" (2).
_MODEL_GRAPH = (7 << 3) | 2
_GRAPH_INITIALIZER = (5 << 3) | 2
_TENSOR_RAW_DATA = (9 << 3) | 2

# Tensors smaller than this stay in the model file: shapes and scalars.
_SMALL_BYTES = 1024
# External tensors start on page boundaries, so that runtimes can map them into memory.
_ALIGNMENT_BYTES = 4096

_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Initializer:
    """A named constant of the file.

    Attributes:
        name: in the graph.
        tensor: its values; 4-bit integers one to a byte.
        dtype: ONNX's number for the type, where it is not that of the tensor: INT4 or UINT4.
    """

    name: str
    tensor: Tensor
    dtype: int | None = None

    @property
    def bytes(self) -> int:
        """Size of the raw values: two 4-bit integers to a byte."""
        if self.dtype is not None:
            return (self.tensor.numel() + 1) // 2
        return self.tensor.numel() * self.tensor.element_size()

    def raw(self) -> memoryview:
        """The values as the file holds them."""
        if self.dtype is None:
            return raw_bytes(self.tensor)
        return raw_bytes(pack_nibbles(self.tensor))


def initializer_of(value: ir.Value, tensor: Tensor) -> Initializer:
    """The constant of a graph's value, which says whether its integers have 4 bits."""
    number = value.dtype
    halves = number is not None and number.name in ("INT4", "UINT4")
    return Initializer(str(value.name), tensor, int(number) if number and halves else None)


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit integers two to a byte, the first in the low half, as ONNX packs them; flat, uint8."""
    flat = codes.detach().reshape(-1).view(torch.uint8) & 15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


def onnx_dtype(dtype: torch.dtype) -> int:
    """ONNX's number for a dtype.

    Raises:
        ExportError: ONNX has no such type.
    """
    from onnx import TensorProto

    name = _DTYPES.get(dtype)
    if name is None:
        raise ExportError(
            f"ONNX files of planish hold no {str(dtype).removeprefix('torch.')} tensors",
            hint="convert the tensor to a real number type before exporting",
        )
    return int(getattr(TensorProto, name))


def write_model(
    model: onnx.ModelProto,
    initializers: list[Initializer],
    path: Path,
    *,
    external_data_bytes: int,
) -> tuple[Path, ...]:
    """Write a model whose graph lacks its initializers, and them.

    Args:
        model: everything but the initializers.
        initializers: written in this order.
        path: where the model goes; external data goes to ``<path>.data``.
        external_data_bytes: constants go to the second file once all of them exceed this.

    Returns:
        The files written: the model, and the data file if there is one.
    """
    data = path.with_name(f"{path.name}.data")
    external = sum(i.bytes for i in initializers) > external_data_bytes
    head = model.__class__()
    head.CopyFrom(model)
    head.ClearField("graph")
    graph = model.graph.SerializeToString(deterministic=True)
    offset = 0
    entries: list[tuple[bytes, Initializer | None]] = []
    outside: list[tuple[int, Initializer]] = []
    for initializer in initializers:
        if external and initializer.bytes >= _SMALL_BYTES:
            offset = -(-offset // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            entries.append((_tensor_header(initializer, (data.name, offset)), None))
            outside.append((offset, initializer))
            offset += initializer.bytes
        else:
            entries.append((_tensor_header(initializer, None), initializer))
    with path.open("wb") as file:
        file.write(head.SerializeToString(deterministic=True))
        _write_graph(file, graph, entries)
        _flush(file)
    if not outside:
        return (path,)
    with data.open("wb") as file:
        for start, initializer in outside:
            file.write(b"\0" * (start - file.tell()))
            file.write(initializer.raw())
        _flush(file)
    return path, data


def _write_graph(
    file: BinaryIO, graph: bytes, entries: list[tuple[bytes, Initializer | None]]
) -> None:
    """Write the graph field: its serialized part, then one initializer field per entry."""
    sizes = []
    for header, inline in entries:
        size = len(header)
        if inline is not None:
            size += 1 + len(_varint(inline.bytes)) + inline.bytes
        sizes.append(size)
    total = len(graph) + sum(1 + len(_varint(size)) + size for size in sizes)
    file.write(bytes([_MODEL_GRAPH]) + _varint(total) + graph)
    for (header, inline), size in zip(entries, sizes, strict=True):
        file.write(bytes([_GRAPH_INITIALIZER]) + _varint(size) + header)
        if inline is not None:
            file.write(bytes([_TENSOR_RAW_DATA]) + _varint(inline.bytes))
            file.write(inline.raw())


def _tensor_header(initializer: Initializer, place: tuple[str, int] | None) -> bytes:
    """A ``TensorProto`` without its values, or with a reference to them."""
    from onnx import TensorProto

    proto = TensorProto(
        name=initializer.name,
        data_type=initializer.dtype or onnx_dtype(initializer.tensor.dtype),
        dims=list(initializer.tensor.shape),
    )
    if place is not None:
        location, offset = place
        proto.data_location = TensorProto.EXTERNAL
        facts = {"location": location, "offset": offset, "length": initializer.bytes}
        for key, value in facts.items():
            proto.external_data.add(key=key, value=str(value))
    return bytes(proto.SerializeToString(deterministic=True))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order as bytes, without a copy where they already lie so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data.cast("B")


def _varint(value: int) -> bytes:
    """Protobuf's variable-length encoding of an unsigned number."""
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _flush(file: BinaryIO) -> None:
    """Make sure that the bytes are on disk before the file is renamed into place."""
    file.flush()
    os.fsync(file.fileno())


def append_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add ``metadata_props`` to a written model: repeated fields may follow one another."""
    from onnx import ModelProto

    tail = ModelProto()
    for key, value in entries.items():
        tail.metadata_props.add(key=key, value=value)
    with path.open("ab") as file:
        file.write(tail.SerializeToString(deterministic=True))
        _flush(file)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to write the artifact in, removed at the end.

    The artifact has its final file name there already, for the model names its data file.

    Raises:
        ExportError: the folder does not exist, is not writable, or is full.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder", hint="give the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist", hint="create it first")
    folder = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir()
        yield folder / path.name
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}",
            hint="check the folder's permissions and free space",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(files: tuple[Path, ...], path: Path) -> tuple[Path, ...]:
    """Rename a staged model and its data file into place, the data first."""
    final = tuple(path.with_name(file.name) for file in files)
    for source, goal in reversed(list(zip(files, final, strict=True))):
        os.replace(source, goal)
    return final
