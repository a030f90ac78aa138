"""What ``--calibration`` takes: files, folders and functions; and what it says of damaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from planish.ir.errors import UsageError
from planish.tools.calibration import First, load_calibration
from tests.tools.test_quantize import _images

HERE = "tests.tools.test_quantize"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, image=_images())
    return path


def test_a_file_is_cut_into_batches(data: Path) -> None:
    found = list(load_calibration(str(data), 8))
    assert [len(batch["image"]) for batch in found] == [8, 8, 4]
    assert torch.equal(torch.cat([b["image"] for b in found]), torch.from_numpy(_images()))
    remarks: list[str] = []
    whole = list(load_calibration(str(data), 8, whole=True, remark=remarks.append))
    assert [len(batch["image"]) for batch in whole] == [8, 8]
    assert len(remarks) == 1


def test_arrays_without_names_are_taken_in_order(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, *[np.full((4, 2), float(i)) for i in range(11)])
    (batch,) = load_calibration(str(path), 4)
    assert isinstance(batch, tuple)
    assert [float(x[0, 0]) for x in batch] == list(map(float, range(11)))


def test_a_folder_gives_one_batch_for_each_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", image=_images(3))
    save_file({"image": torch.from_numpy(_images(5))}, tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("not data")
    found = load_calibration(str(tmp_path), 2)
    for _ in range(2):  # it can be read again
        assert [len(batch["image"]) for batch in found] == [5, 3]


def test_a_callable(data: Path) -> None:
    del data
    assert len(list(load_calibration(f"{HERE}:batches", 8))) == 10


def test_the_first_batch_is_remembered() -> None:
    first = First(iter([1, 2]))
    assert list(first) == [1, 2]
    assert first.first == 1


def _wrong(path: Path) -> None:
    np.savez(path, image=_images(), ids=np.zeros(3))


def _pickled(path: Path) -> None:
    np.savez(path, image=np.array([{"a": 1}], dtype=object))


def _pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04}\x94.")  # of an empty dict


def _cut_off(path: Path) -> None:
    np.savez(path, image=_images())
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path: Path) -> None:
    np.savez(path, image=_images())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def _texts(path: Path) -> None:
    np.savez(path, image=np.array(["a photo", "another"]))


def _nameless(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, _images())


def _damaged(path: Path) -> None:
    path.write_bytes(b"not a zip file")


def _empty(path: Path) -> None:
    np.savez(path)


def _no_samples(path: Path) -> None:
    np.savez(path, image=_images()[:0])


def _not_finite(path: Path) -> None:
    images = _images()
    images[3, 0, 0, 0] = np.nan
    np.savez(path, image=images)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_wrong, "different numbers of samples: image .*, ids"),
        (_pickled, r"'image' in '.*data.npz' cannot be read: it holds Python objects"),
        (_pickle, r"data.npz' cannot be read: it is no file of arrays"),
        (_damaged, r"data.npz' cannot be read"),
        (_cut_off, r"data.npz' cannot be read"),
        (_flipped, r"'image' in '.*data.npz' cannot be read: .*CRC"),
        (_texts, r"'image' in '.*data.npz' cannot be read: .*numpy.str_"),
        (_nameless, "holds one array without a name"),
        (_empty, "holds no array"),
        (_no_samples, r"holds no samples: image \[0, 3, 8, 8\]"),
        (_not_finite, "'image' in .* holds NaN or infinity"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, make: Any, reason: str) -> None:
    path = tmp_path / "data.npz"
    make(path)
    with pytest.raises(UsageError, match=reason):
        list(load_calibration(str(path), 8))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nowhere.npz", "there is no file"),
        ("nowhere", "is no calibration data"),
        (f"{HERE}:no_batches", "returned a int"),
        ("no_such_module:batches", "there is no module"),
    ],
)
def test_specs_that_name_nothing(spec: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_calibration(spec, 8)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.npz"):
        load_calibration(str(tmp_path), 8)
