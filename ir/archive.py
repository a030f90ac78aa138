"""Zip files of JSON and tensors: written whole or not at all, and read with suspicion.

Tensors are stored in the safetensors layout: an 8-byte length, a JSON header, the bytes.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from planish.ir.errors import ExportError, UnsupportedError, UsageError

Writer = Callable[[IO[bytes]], None]

# Deflated text shrinks about tenfold, a bomb a thousandfold.
_LARGEST_RATIO = 200
_SMALL = 1 << 20
_LARGEST_HEADER = 100 << 20

SAFETENSORS: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_TORCH = {name: dtype for dtype, name in SAFETENSORS.items()}


# -- writing --------------------------------------------------------------------------------------


def write_archive(path: Path, entries: Sequence[tuple[str, bytes | Writer]]) -> None:
    """Write a zip file under a temporary name, then move it into place.

    Bytes are compressed; what a ``Writer`` writes is stored as it is. Equal entries give equal
    files, byte for byte.

    Raises:
        ExportError: the file cannot be written. Nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("xb") as stream, zipfile.ZipFile(stream, "w") as archive:
                for name, content in entries:
                    _write_entry(archive, name, content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}",
            hint="check that the folder exists, is writable and has room",
        ) from error


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes | Writer) -> None:
    # A fixed date and system: equal programs give equal files, whenever and wherever.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    if isinstance(content, bytes):
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, content)
    else:
        with archive.open(info, "w", force_zip64=True) as stream:
            content(stream)


def json_bytes(data: object) -> bytes:
    """JSON in one canonical form; NaN is refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def tensors_writer(tensors: Mapping[str, Tensor]) -> Writer:
    """A writer of dense tensors in the safetensors layout, one by one.

    Raises:
        UnsupportedError: the layout has no name for an element type.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS:
            raise UnsupportedError(f"{name!r} has element type {tensor.dtype}, which has no code")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(stream: IO[bytes]) -> None:
        stream.write(struct.pack("<Q", len(head)))
        stream.write(head)
        for tensor in tensors.values():
            stream.write(memoryview(raw_bytes(tensor)))

    return write


def raw_bytes(tensor: Tensor) -> Any:  # noqa: ANN401 - a numpy array of bytes
    """The elements of a tensor in row-major order, as a flat array of bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def pack(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Bring tensors into a form that the layout has a code for; tensors of one memory become one.

    Returns:
        What to store, and for each tensor (in order) how to get it back.

    Raises:
        UnsupportedError: a tensor is not dense or has no values.
    """
    stored: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    owners: dict[Any, str] = {}
    for name, tensor in named.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise UnsupportedError(f"{name!r} is a {type(tensor).__name__} of {tensor.layout}")
        if tensor.is_meta or tensor.is_quantized:
            raise UnsupportedError(f"{name!r} has no plain values")
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        owner = owners.setdefault(place, name) if tensor.numel() else name
        row: dict[str, Any] = {"name": name, "stored": owner}
        rows.append(row)
        if owner != name:
            continue
        if tensor.device.type != "cpu":
            row["device"] = str(tensor.device)
        if not tensor.is_contiguous() and _is_permuted(tensor):
            row["stride"] = list(tensor.stride())
        if tensor.dtype not in SAFETENSORS:
            row |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            tensor = torch.from_numpy(raw_bytes(tensor))
        stored[name] = tensor
    return stored, rows


def _is_permuted(tensor: Tensor) -> bool:
    """Whether the memory is dense, if not in row-major order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def unpack(stored: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The inverse of ``pack``.

    Raises:
        ValueError, KeyError, RuntimeError: the rows do not fit what was stored.
    """
    found: dict[str, Tensor] = {}
    for row in rows:
        name, owner = row["name"], row["stored"]
        if owner != name:
            found[name] = found[owner]
            continue
        tensor = stored[owner]
        if "dtype" in row:
            dtype = getattr(torch, row["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has no element type {row['dtype']!r}")
            tensor = tensor.view(dtype).reshape(row["shape"])
        if "stride" in row:
            strided = torch.empty_strided(tensor.shape, row["stride"], dtype=tensor.dtype)
            if not _is_permuted(strided):
                raise ValueError(f"{name} has strides {row['stride']}")
            tensor = strided.copy_(tensor)
        found[name] = tensor.to(row["device"]) if "device" in row else tensor
    return found


# -- reading --------------------------------------------------------------------------------------


class Archive:
    """A zip file from an unknown hand.

    Raises:
        UsageError: it does not exist, is no zip file, is damaged, or expands beyond reason.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise UsageError(f"{path} does not exist", hint="check the name and the folder")
        if not path.is_file():
            raise UsageError(f"{path} is not a file", hint="pass a .pt2 file")
        with self._reading("the list of its entries"):
            self._zip = zipfile.ZipFile(path)
        try:
            self._check_entries(path.stat().st_size)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    @property
    def names(self) -> list[str]:
        """Names of the entries."""
        return self._zip.namelist()

    def _check_entries(self, file_bytes: int) -> None:
        entries = self._zip.infolist()
        if len({e.filename for e in entries}) != len(entries):
            raise self.damaged("two entries have one name")
        if sum(e.compress_size for e in entries) > file_bytes:
            raise self.damaged("its entries overlap")
        for entry in entries:
            limit = max(_SMALL, _LARGEST_RATIO * entry.compress_size)
            if entry.file_size > limit:
                raise UsageError(
                    f"{self.path}: entry {entry.filename!r} would expand from "
                    f"{entry.compress_size} to {entry.file_size} bytes",
                    hint="this is not a file that planish or torch wrote; do not trust it",
                )

    def damaged(self, why: str) -> UsageError:
        """The error for a file that is not what it should be."""
        return UsageError(
            f"{self.path} is damaged or not a program: {why}",
            hint="save or download it again",
        )

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except (zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise self.damaged(f"{what}: {error}") from error
        except (NotImplementedError, RuntimeError) as error:  # encryption, exotic compression
            raise self.damaged(f"{what}: {error}") from error

    def size(self, name: str) -> int:
        """Bytes of an entry."""
        return self._zip.getinfo(name).file_size

    def read(self, name: str) -> bytes:
        """The content of an entry."""
        if name not in self.names:
            raise self.damaged(f"it has no entry {name!r}")
        with self._reading(name):
            return self._zip.read(name)

    def json(self, name: str) -> Any:  # noqa: ANN401 - any JSON
        """The content of a JSON entry."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{name}: {error}") from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors entry, each in memory of its own."""
        if name not in self.names:
            raise self.damaged(f"it has no entry {name!r}")
        total = self.size(name)
        with self._reading(name), self._zip.open(name) as stream:
            (length,) = struct.unpack("<Q", _exactly(stream, 8))
            if length > min(total, _LARGEST_HEADER):
                raise self.damaged(f"{name}: the header is longer than the entry")
            try:
                header = json.loads(_exactly(stream, length))
                plan = _plan(header, total - 8 - length)
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                raise self.damaged(f"{name}: bad header: {error}") from error
            return {key: _read_tensor(stream, dtype, shape) for key, dtype, shape in plan}


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError("the entry ends too early")
    return data


def _plan(header: dict[str, Any], available: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What to read, in order.

    Raises:
        ValueError: sizes do not agree with the offsets, or the offsets with the entry.
    """
    plan = []
    position = 0
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _TORCH[entry["dtype"]], tuple(entry["shape"])
        count = 1
        for size in shape:
            if type(size) is not int or size < 0:
                raise ValueError(f"{name} has a size of {size}")
            count *= size
        begin, end = entry["data_offsets"]
        if begin != position or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} cannot lie at {begin}..{end}")
        position = end
        plan.append((name, dtype, shape))
    if position != available:
        raise ValueError(f"the tensors take {position} bytes, the entry has {available}")
    return plan


def _read_tensor(stream: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    target = memoryview(raw_bytes(tensor))
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the entry ends too early")
        done += count
    return tensor
