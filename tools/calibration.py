"""The ``--calibration`` argument: a file or folder of arrays, or a function that gives inputs.

FILE.npz, FILE.safetensors    one array for each input, under its name, samples along the first
                              axis; arrays without names (``np.savez(path, x, y)``) are taken in
                              order. Cut into batches.
DIR                           ``*.npz`` and ``*.safetensors`` files, one batch each, in the order
                              of their names
package.module:callable       called without arguments; returns an iterable of inputs
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import UsageError

_SUFFIXES = (".npz", ".safetensors")
_POSITIONAL = re.compile(r"arr_(\d+)")

_WRITE = "write it with np.savez(path, name_of_input=array, ...); no Python objects"
FORMS = (
    "--calibration FILE.npz (one array for each input, samples along the first axis), a folder "
    "of *.npz or *.safetensors files with one batch each, or package.module:callable"
)


def load_calibration(
    spec: str,
    batch: int,
    *,
    whole: bool = False,
    remark: Callable[[str], None] = lambda sentence: None,
) -> Iterable[Any]:
    """Inputs to calibrate with.

    Args:
        spec: what ``--calibration`` says.
        batch: samples of one batch, where a file is cut into batches.
        whole: leave out a last batch that is smaller, for a model whose batch is fixed.
        remark: told of samples that are left out.

    Raises:
        UsageError: there is nothing like that, or a file holds something else.
    """
    path = Path(spec)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES)
        if not files:
            raise UsageError(
                f"the folder {spec!r} holds no *.npz or *.safetensors files",
                hint="put one batch into each file: np.savez('000.npz', input_ids=..., ...)",
            )
        return _Folder(files)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise UsageError(f"there is no file {spec!r}", hint=f"give {FORMS}")
        batches, left = _cut(_arrays(path), batch, path, whole=whole)
        if left:
            remark(
                f"the last {left} samples of {path.name} are left out: they fill no batch of "
                f"{batch}, which the model takes"
            )
        return batches
    if ":" in spec:
        return _called(spec)
    raise UsageError(f"{spec!r} is no calibration data", hint=f"give {FORMS}")


def labels(labeled: str | None, loss: str | None) -> dict[str, Any]:
    """What ``--labeled`` and ``--loss`` name, as ``optimize`` takes it.

    Args:
        labeled: called without arguments; returns a re-iterable of batches with labels.
        loss: taken as it is.

    Raises:
        UsageError: there is one without the other, one cannot be imported, or no batches come.
    """
    from planish.tools.loading import import_callable

    if (labeled is None) != (loss is None):
        given, missing = ("--loss", "--labeled") if labeled is None else ("--labeled", "--loss")
        raise UsageError(
            f"{given} without {missing}", hint=f"add {missing} package.module:callable"
        )
    if labeled is None or loss is None:
        return {}
    return {"labeled": _called(labeled), "loss": import_callable(loss)}


class First:
    """An iterable that remembers its first item."""

    def __init__(self, items: Iterable[Any]):
        self._items = items
        self.first: Any = None

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self._items):
            if number == 0:
                self.first = item
            yield item


class _Folder:
    """Reads one file for each batch, when it is asked for."""

    def __init__(self, files: list[Path]):
        self._files = files

    def __iter__(self) -> Iterator[Any]:
        for path in self._files:
            yield _inputs(_arrays(path), path)


def _called(spec: str) -> Iterable[Any]:
    from planish.tools.loading import import_callable

    made = import_callable(spec)()
    if not isinstance(made, Iterable):
        raise UsageError(
            f"{spec}() returned a {type(made).__name__}",
            hint="return an iterable of inputs: a dict is keyword arguments, a tuple positional",
        )
    return made


def _arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a file.

    Raises:
        UsageError: it is damaged, holds Python objects, or no array.
    """
    found = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    if not found:
        raise UsageError(f"{str(path)!r} holds no array", hint=_WRITE)
    for name, value in found.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(
                f"{name!r} in {str(path)!r} holds NaN or infinity",
                where=f"sample {int((~value.isfinite()).nonzero()[0][0])}" if value.dim() else None,
                hint="leave such samples out: no range can be taken from them",
            )
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{str(path)!r} cannot be read: {error}", hint="is it whole? write it again"
        ) from error


def _npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a file of numpy's; nothing in it is ever unpickled."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile, numpy and the system each raise their own
        what = "it is no file of arrays" if "pickle" in str(error) else str(error)
        raise UsageError(f"{str(path)!r} cannot be read: {what}", hint=_WRITE) from error
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise UsageError(f"{str(path)!r} holds one array without a name", hint=_WRITE)
    found: dict[str, Tensor] = {}
    with loaded:
        for name in loaded.files:
            try:
                value = loaded[name]
                found[name] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            except Exception as error:  # zlib, zipfile, numpy and torch each raise their own
                what = str(error)
                if "Object arrays" in what:
                    what = "it holds Python objects, which are pickled and never read"
                raise UsageError(
                    f"{name!r} in {str(path)!r} cannot be read: {what}",
                    hint="give arrays of numbers, all rows of one length; is the file whole?",
                ) from error
    return found


class _Named(dict[str, Any]):
    """Keyword arguments that know the file they come from."""

    origin: str


class _Listed(tuple[Any, ...]):
    """Positional arguments that know the file they come from."""

    origin: str


def _inputs(arrays: Mapping[str, Tensor], path: Path) -> _Named | _Listed:
    """Arrays as one call's inputs: by name, or in order where they have none."""
    places = [_POSITIONAL.fullmatch(name) for name in arrays]
    if all(places):
        order = sorted(arrays, key=lambda name: int(name.removeprefix("arr_")))
        found: _Named | _Listed = _Listed(arrays[name] for name in order)
    else:
        found = _Named(arrays)
    found.origin = str(path)
    return found


def _cut(
    arrays: Mapping[str, Tensor], batch: int, path: Path, *, whole: bool
) -> tuple[list[Any], int]:
    """Batches of a file's samples, and how many samples are left out.

    Raises:
        UsageError: the arrays do not hold the same number of samples.
    """
    counts = {name: (value.shape[0] if value.dim() else 0) for name, value in arrays.items()}
    if not any(counts.values()):
        raise UsageError(
            f"{str(path)!r} holds no samples: "
            + ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items()),
            hint="the first axis of every array counts samples; a few hundred are enough",
        )
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
        raise UsageError(
            f"the arrays of {str(path)!r} hold different numbers of samples: {shown}",
            hint="the first axis of every array counts samples; labels do not belong into it",
        )
    total = next(iter(counts.values()))
    left = total % batch if whole and total >= batch else 0
    return [
        _inputs({name: value[start : start + batch] for name, value in arrays.items()}, path)
        for start in range(0, total - left, batch)
    ], left
