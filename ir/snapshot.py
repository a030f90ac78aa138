"""What a pass must not write into, as it was before, so that a write is found."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from planish.ir.program import Program

_LOOKED_AT = 64  # bytes of a tensor


@dataclass(frozen=True)
class _Entry:
    name: str
    tensor: Tensor
    version: int | None  # torch counts in-place writes; not for tensors of inference mode
    checksum: int | None
    looked_at: Any  # a NumPy view of some bytes of the tensor's memory, or None
    some: bytes


class Snapshot:
    """Constants and samples of a program, as they were when it was taken.

    The bodies of branches, which clones share as well, are kept as text.

    Torch counts the in-place operations on a tensor, which costs nothing to read. The count misses
    writes through ``tensor.data``, NumPy or another library. Of these, a few bytes from all over
    the tensor show the ones that write much of it, at some microseconds a tensor; ``values=True``
    finds all, by a checksum of all bytes (about 1 GB/s), as do tensors of inference mode, which
    have no count.

    Args:
        program: holds the tensors; it is not kept alive, they are.
        values: also take checksums.
    """

    def __init__(self, program: Program, *, values: bool = False):
        self._entries = [
            _Entry(name, tensor, version, full, view, b"" if view is None else view.tobytes())
            for name, tensor in _tensors(program)
            for version in [None if tensor.is_inference() else tensor._version]
            for full in [checksum(tensor) if values or version is None else None]
            for view in [_some(tensor) if full is None else None]
        ]
        self._bodies = [
            (name, value, _body_text(value))
            for name, value in program.constants.items()
            if isinstance(value, GraphModule)
        ]

    def written(self) -> Iterator[str]:
        """Names of the tensors, and of the bodies of branches, that were written since."""
        for name, body, then in self._bodies:
            if _body_text(body) != then:
                yield f"the body {name!r} of a branch"
        for entry in self._entries:
            if entry.version is not None and entry.tensor._version != entry.version:
                yield entry.name
            elif (entry.checksum is not None and checksum(entry.tensor) != entry.checksum) or (
                entry.looked_at is not None and entry.looked_at.tobytes() != entry.some
            ):
                yield entry.name


def _body_text(body: GraphModule) -> str:
    """All operators of a body, and of the bodies within it."""
    return "\n".join(str(m.graph) for m in body.modules() if isinstance(m, GraphModule))


def _tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    for name, value in program.constants.items():
        if isinstance(value, Tensor):
            yield f"the constant {name!r}", value
    for number, sample in enumerate(program.samples):
        for name, value in zip(program.signature.tensor_names, sample, strict=False):
            if isinstance(value, Tensor):
                yield f"the input {name!r} of sample {number}", value


def _some(tensor: Tensor) -> Any:  # noqa: ANN401 - a NumPy array, and NumPy is torch's own affair
    """A view of a few bytes of a tensor's memory, from all over it; None where it has none."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    # An odd step visits all bytes of an element by turns.
    step = max(1, memory.numel() // _LOOKED_AT) | 1
    return memory[::step].numpy()


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, in logical order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():
        return 0
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
