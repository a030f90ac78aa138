"""Constants on disk: every element type and layout comes back, shared memory stays shared."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor

from planish.ir import Program, load, save
from planish.ir.errors import UnsupportedError
from tests.support.nets import held


def round_trip(program: Program, folder: Path) -> Program:
    path = folder / "program.pt2"
    save(program, path)
    return load(path)


TENSORS = {
    "scalar": torch.tensor(2.5),
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(3).half(),
    "brain": torch.randn(3).bfloat16(),
    "double": torch.randn(3, dtype=torch.float64),
    "complex": torch.randn(2, dtype=torch.complex64),
    "complex_double": torch.randn(2, 2, dtype=torch.complex128),
    "byte": torch.arange(5, dtype=torch.uint8),
    "short": torch.arange(5, dtype=torch.int16) - 2,
    "wide": torch.tensor([2**40, -1]),
    "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "eight_other": torch.randn(4).to(torch.float8_e4m3fnuz),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(3, 5).t(),
    "strided": torch.arange(12.0).view(3, 4)[1:, ::2],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "special": torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0]),
}


def bits(tensor: Tensor) -> bytes:
    flat = tensor.resolve_conj().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy())


@pytest.mark.parametrize("name", TENSORS)
def test_a_constant_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    again = round_trip(held({name: tensor}), tmp_path).constants[name]
    assert isinstance(again, Tensor)
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert bits(again) == bits(tensor)
    if name in ("transposed", "channels_last"):
        assert again.stride() == tensor.stride()


def test_constants_that_share_memory_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    program = held({"a": weight, "b.c": weight, "other": weight.clone()})
    again = round_trip(program, tmp_path)
    assert again.constants["a"] is again.constants["b.c"]
    assert again.constants["a"] is not again.constants["other"]
    assert (tmp_path / "program.pt2").stat().st_size < 2 * weight.nbytes + 20_000


def test_a_view_of_another_constant_is_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    again = round_trip(held({"base": base, "part": base[2:5]}), tmp_path)
    torch.testing.assert_close(again.constants["part"], torch.tensor([2.0, 3, 4]))
    torch.testing.assert_close(again.constants["base"], base)


def test_the_tensor_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {n: t for n, t in TENSORS.items() if not n.startswith(("complex", "eight_other"))}
    save(held(tensors), tmp_path / "p.pt2")
    with zipfile.ZipFile(tmp_path / "p.pt2") as archive:
        assert archive.getinfo("constants.safetensors").compress_type == zipfile.ZIP_STORED
        read = safetensors_load(archive.read("constants.safetensors"))
    assert set(read) == set(tensors)
    assert all(bits(read[name]) == bits(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name", ["w", "we", "wei", "weig", "weigh", "weight", "weights", "a_weight"]
)
def test_tensors_begin_where_eight_bytes_do(name: str, tmp_path: Path) -> None:
    save(held({name: torch.arange(3.0)}), tmp_path / "p.pt2")
    with zipfile.ZipFile(tmp_path / "p.pt2") as archive:
        data = archive.read("constants.safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])[name]["data_offsets"] == [0, 12]
    assert data[8 + length :] == bits(torch.arange(3.0))


def test_entries_are_dated_alike(tmp_path: Path) -> None:
    save(held({"w": torch.ones(2)}), tmp_path / "p.pt2")
    with zipfile.ZipFile(tmp_path / "p.pt2") as archive:
        facts = {(i.date_time, i.create_system, i.external_attr) for i in archive.infolist()}
    assert facts == {((1980, 1, 1, 0, 0, 0), 3, 0o644 << 16)}


def test_a_sparse_constant_is_refused_by_name(tmp_path: Path) -> None:
    program = held({"weight": torch.ones(2, 2)})
    program.constants["weight"] = torch.eye(2).to_sparse()
    with pytest.raises(UnsupportedError, match="'weight' is a Tensor of"):
        save(program, tmp_path / "p.pt2")
    assert list(tmp_path.iterdir()) == []
