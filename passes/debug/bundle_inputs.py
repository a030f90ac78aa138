"""Batches of flat inputs in a file: JSON and safetensors in a zip, read and written one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import IO, Any, Protocol

from torch import Tensor

from planish.ir.archive import (
    Archive,
    Writer,
    json_bytes,
    pack,
    tensors_writer,
    unpack,
    write_archive,
)
from planish.ir.trees import decode, encode

_INDEX = "inputs.json"


class Batches(Sized, Iterable[tuple[Any, ...]], Protocol):
    """A known number of batches of flat inputs, to be iterated as often as one likes."""


def write_inputs(path: Path, names: tuple[str, ...], batches: Batches) -> None:
    """Write batches; no more than one is in memory at a time.

    Args:
        path: the file.
        names: of the inputs.
        batches: one value per name each; tensors, or plain values.

    Raises:
        UnsupportedError: a value is neither.
        ExportError: the file cannot be written.
    """
    source = iter(batches)
    rows: list[Any] = []

    def one(stream: IO[bytes]) -> None:
        values = next(source)
        tensors = {n: v for n, v in zip(names, values, strict=True) if isinstance(v, Tensor)}
        stored, packed = pack(tensors)
        plain = {n: v for n, v in zip(names, values, strict=True) if n not in tensors}
        kept = {name: encode(value, f"input {name!r}") for name, value in plain.items()}
        rows.append({"tensors": packed, "plain": kept})
        tensors_writer(stored)(stream)

    def index(stream: IO[bytes]) -> None:
        stream.write(json_bytes({"names": list(names), "batches": rows}))

    # The index says how each batch was packed, hence it comes last.
    write: Callable[[IO[bytes]], None] = one
    entries: list[tuple[str, bytes | Writer]] = [(_entry(i), write) for i in range(len(batches))]
    write_archive(path, [*entries, (_INDEX, index)])


class Inputs:
    """Batches in a file; iterating reads one after the other.

    Raises:
        UsageError: the file is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with Archive(path) as archive:
            index = archive.json(_INDEX)
            try:
                self.names = tuple(str(name) for name in index["names"])
                self._rows = [(row["tensors"], dict(row["plain"])) for row in index["batches"]]
            except (KeyError, TypeError, ValueError) as error:
                raise archive.damaged(f"{_INDEX}: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        with Archive(self.path) as archive:
            for number, (packed, plain) in enumerate(self._rows):
                stored = archive.tensors(_entry(number))
                try:
                    found: dict[str, Any] = unpack(stored, packed)
                    found |= {name: decode(value) for name, value in plain.items()}
                    batch = tuple(found[name] for name in self.names)
                except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    raise archive.damaged(f"batch {number}: {error}") from error
                yield batch


def _entry(number: int) -> str:
    return f"{number:06}.safetensors"
