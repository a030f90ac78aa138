"""The spool: calibration inputs, read once from the caller and kept for every pass.

A generator can be read only once and a loader may shuffle, so what the caller gives is read a
single time, checked, and kept: the first batches in memory, later ones in a temporary folder that
goes away with the spool. Passes iterate it as often as they like and get flat inputs.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.passes.base import Contract, Fact
from planish.passes.calibrate_reading import batches, flat
from planish.passes.recipe import Recipe

IN_MEMORY_BYTES = 64 << 20
LIMIT_BYTES = 2 << 30
_EVERY = 5  # of the batches, where some are held out
_FEWEST_TO_SPLIT = 4

UNUSED = "calibration was given, but no pass of the recipe has a use for it: it was not read"


def needs_calibration(recipe: Recipe) -> bool:
    """Whether calibration inputs have any use: for a pass, or to measure what a lossy one did."""
    return any(
        Fact.CALIBRATED in pass_.needs() or pass_.contract is Contract.LOSSY
        for pass_ in recipe.passes
    )


def spool(
    calibration: Iterable[Any],
    program: Program,
    *,
    remark: Callable[[str], None] = lambda sentence: None,
    limit_bytes: int = LIMIT_BYTES,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Spool:
    """Read calibration inputs once.

    Args:
        calibration: an iterable of inputs, or a DataLoader. A dict is keyword arguments, a tuple
            or list positional ones, a tensor one argument.
        program: what the inputs are for; every batch is checked against its inputs.
        remark: told if the limit ended the reading.
        limit_bytes: how much is kept at most; at least one batch is.
        in_memory_bytes: how much of that stays in memory.

    Raises:
        UsageError: it cannot be iterated, is empty, or a batch does not fit the program; says
            which batch and why.
    """
    held = Spool(program, in_memory_bytes)
    try:
        for number, batch in enumerate(batches(calibration)):
            inputs = flat(batch, program, number)
            size = sum(v.numel() * v.element_size() for v in inputs if isinstance(v, Tensor))
            if len(held) and held.bytes + size > limit_bytes:
                remark(
                    f"calibration ended after {len(held)} batches: more than "
                    f"{limit_bytes / 2**20:.0f} MiB are not kept"
                )
                break
            held.add(inputs, size)
        if not len(held):
            raise UsageError(
                "calibration gave no batch",
                hint="a generator can be read only once: pass a fresh one, or a list",
            )
    except BaseException:
        held.close()
        raise
    return held


class Spool:
    """Kept calibration inputs; iterating gives one flat tuple of inputs per batch.

    Use ``spool`` to fill one. It is a context manager; ``close`` removes what lies on disk, and
    so does the end of its life.

    Args:
        program: names the inputs.
        in_memory_bytes: batches beyond this go to disk.
    """

    def __init__(self, program: Program, in_memory_bytes: int = IN_MEMORY_BYTES):
        self.names = program.signature.tensor_names
        self.bytes = 0
        self._in_memory_bytes = in_memory_bytes
        self._memory: list[tuple[Any, ...]] = []
        self._disk: list[tuple[Path, dict[int, Any]]] = []  # with what is no tensor
        self._folder: Path | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._memory) + len(self._disk)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._closed:
            raise UsageError("the calibration spool is closed", hint="calibrate before closing it")
        yield from self._memory
        for path, plain in self._disk:
            yield _read(path, plain)

    def add(self, inputs: tuple[Any, ...], size: int) -> None:
        """Keep one batch.

        Args:
            inputs: flat inputs; they are copied.
            size: their bytes.
        """
        self.bytes += size
        if self.bytes <= self._in_memory_bytes and not self._disk:
            # A copy: loaders and generators may reuse one buffer for every batch.
            self._memory.append(tuple(v.clone() if isinstance(v, Tensor) else v for v in inputs))
            return
        self._write(inputs)

    def batch(self, number: int) -> tuple[Any, ...]:
        """One batch."""
        if self._closed:
            raise UsageError("the calibration spool is closed", hint="calibrate before closing it")
        if number < len(self._memory):
            return self._memory[number]
        return _read(*self._disk[number - len(self._memory)])

    def split(self) -> tuple[Spool, Spool | None]:
        """The batches to take ranges from, and those to judge the result by: every fifth.

        Fewer than four batches are not split: ranges need them all.
        """
        count = len(self)
        if count < _FEWEST_TO_SPLIT:
            return self, None
        held = range(_EVERY - 1, count, _EVERY) if count >= _EVERY else (count - 1,)
        rest = [number for number in range(count) if number not in held]
        return _Part(self, rest), _Part(self, held)

    def close(self) -> None:
        """Drop everything that is kept."""
        self._closed = True
        self._memory = []
        self._disk = []
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _write(self, inputs: tuple[Any, ...]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = _temporary()
            self._finalizer = weakref.finalize(
                self, shutil.rmtree, self._folder, ignore_errors=True
            )
        path = self._folder / f"{len(self):06}.safetensors"
        plain = {i: v for i, v in enumerate(inputs) if not isinstance(v, Tensor)}
        # Distinct memory for each: the format refuses tensors that share it.
        tensors = {
            str(i): v.clone(memory_format=torch.contiguous_format)
            for i, v in enumerate(inputs)
            if isinstance(v, Tensor)
        }
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:  # the second wraps most of the first
            raise UsageError(
                f"calibration inputs cannot be kept on disk: {error}",
                where=str(path),
                hint="make room there, set TMPDIR, or pass fewer batches",
            ) from error
        self._disk.append((path, plain))


class _Part(Spool):
    """Some batches of a spool, which goes on keeping them."""

    def __init__(self, whole: Spool, numbers: Sequence[int]):
        self.names, self.bytes = whole.names, whole.bytes
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (self._whole.batch(number) for number in self._numbers)

    def batch(self, number: int) -> tuple[Any, ...]:
        """One batch of the part."""
        return self._whole.batch(self._numbers[number])

    def close(self) -> None:
        """Close the whole spool."""
        self._whole.close()


def _temporary() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="planish-calibration-"))
    except OSError as error:
        raise UsageError(
            f"calibration inputs cannot be kept on disk: {error}",
            hint="set TMPDIR to a folder that can be written",
        ) from error


def _read(path: Path, plain: Mapping[int, Any]) -> tuple[Any, ...]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    count = len(tensors) + len(plain)
    return tuple(plain[i] if i in plain else tensors[str(i)] for i in range(count))
