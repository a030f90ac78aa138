"""Damaged files are refused with one clear error, whatever is wrong with them."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planish.ir import load, save, text
from planish.ir.archive import Archive
from planish.ir.errors import PlanishError, UnsupportedError, UsageError
from tests.support.foreign import Edit, edit_json, edited, exported_file
from tests.support.nets import net_program


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_file(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.pt2"
    save(net_program()[1], path)
    return path


def refused(path: Path) -> str:
    with pytest.raises((UsageError, UnsupportedError)) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "none.pt2")


def test_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04", b"\x00" * 5000])
def test_what_is_no_zip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(content)
    assert "is damaged or not a program" in refused(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(own.read_bytes())
    path.chmod(0)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("kind", ["own", "foreign"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(
    kind: str, share: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue(kind).read_bytes()
    path = tmp_path / "p.pt2"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "is damaged or not a program" in refused(path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_a_flipped_byte_is_refused_or_harmless(
    kind: str, data: st.DataObject, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = bytearray(request.getfixturevalue(kind).read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "p.pt2"
    path.write_bytes(whole)
    try:
        program = load(path)
    except (UsageError, UnsupportedError):
        pass
    else:
        assert text(program, values=True) == text(load(request.getfixturevalue(kind)), values=True)


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_every_missing_entry_is_an_error(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
    needless = ("version", "serialization_id", "sample_inputs/model.pt")
    for name in names:
        if name.endswith(needless) and kind == "foreign" and "archive_version" not in name:
            continue
        message = refused_or_capture(edited(source, tmp_path, without(name)))
        assert message


def without(name: str) -> Edit:
    return lambda entries: entries.__delitem__(name)


def refused_or_capture(path: Path) -> str:
    with pytest.raises(PlanishError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "change", "because"),
    [
        ("planish.json", lambda d: {**d, "version": 2}, "format version 2"),
        ("planish.json", lambda d: {**d, "format": "other"}, "not that of a program"),
        ("planish.json", lambda d: [], "not that of a program"),
        ("planish.json", lambda d: {**d, "nodes": {"rows": []}}, "damaged"),
        ("planish.json", lambda d: {**d, "results": d["results"][:-1]}, "different outputs"),
        ("planish.json", lambda d: {**d, "constants": []}, "damaged"),
        ("graph.json", lambda d: {}, "not a graph"),
        ("graph.json", lambda d: {"graph_module": 3}, "damaged"),
        ("graph.json", lambda d: {**d, "schema_version": {"major": 99, "minor": 0}}, "schema"),
    ],
)
def test_json_that_does_not_fit_is_refused(
    suffix: str, change: Callable[[Any], Any], because: str, own: Path, tmp_path: Path
) -> None:
    assert because in refused(edited(own, tmp_path, edit_json(suffix, change)))


def test_a_constant_of_another_shape_is_refused(own: Path, tmp_path: Path) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        data = entries["constants.safetensors"]
        assert b'"shape":[4,4]' in data
        entries["constants.safetensors"] = data.replace(b'"shape":[4,4]', b'"shape":[2,8]')

    assert "is not of the type the graph says" in refused(edited(own, tmp_path, edit))


def safetensors(header: Any, body: bytes) -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 50) + b"{}",
        safetensors([], b""),
        safetensors({"a": 1}, b""),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b""),
        safetensors({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
        safetensors({"a": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}, b"\0"),
        safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0\0"),
    ],
)
def test_tensors_that_do_not_add_up_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t.safetensors", content)
    with Archive(path) as opened, pytest.raises(UsageError, match="damaged"):
        opened.tensors("t.safetensors")


def test_a_zip_bomb_is_refused_before_it_expands(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("planish.json", b" " * (64 << 20))
    assert "would expand" in refused(path)


def test_two_entries_of_one_name_are_refused(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("planish.json", b"{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("planish.json", b"[]")
    assert "two entries have one name" in refused(path)


def test_a_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.onnx", b"...")
    assert "not an archive of torch.export.save or planish" in refused(path)


@pytest.mark.parametrize(
    ("edit", "because"),
    [
        (lambda e: e.update({"foreign/archive_version": b"7"}), "archive version 7"),
        (lambda e: e.update({"foreign/byteorder": b"big"}), "big-endian"),
        (lambda e: e.update({"foreign/models/two.json": b"{}"}), "holds 2 exported programs"),
        (lambda e: e.update({"foreign/data/aotinductor/m/w.so": b""}), "compiled code"),
        (lambda e: e.update({"foreign/data/weights/weight_0": b"\0" * 4}), "damaged"),
    ],
)
def test_foreign_archives_that_planish_does_not_read(
    edit: Edit, because: str, foreign: Path, tmp_path: Path
) -> None:
    assert because in refused(edited(foreign, tmp_path, edit))


def test_deeply_nested_json_is_refused(own: Path, tmp_path: Path) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        entries["planish.json"] = b"[" * 100_000 + b"]" * 100_000

    assert "damaged" in refused(edited(own, tmp_path, edit))
