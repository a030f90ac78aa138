"""The parts of a foreign file, one by one: its pickle's opcodes, its tensors, its structures."""

import io
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir import capture, load, save
from planish.ir import foreign as reader
from planish.ir.errors import UnsupportedError, UsageError
from planish.ir.foreign import check_pickle
from planish.ir.trees import class_name, known_class, spec_from_json
from tests.support.foreign import Small, edited, exported_file


def torch_archive(*pickles: bytes, packed: bool = False) -> bytes:
    """A ``torch.save`` archive around any number of pickles."""
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        archive.writestr("archive/version", "3\n")
        for number, content in enumerate(pickles):
            archive.writestr(f"archive/data{number or ''}.pkl", content)
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# -- what a pickle may hold -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    ],
)
def test_tensors_of_every_type_pass(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    check_pickle(saved(((tensor, nn.Parameter(torch.ones(1)), 3, None), {"x": [tensor.t()]})), "it")


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"cposix\nsystem\n.", "it name 'posix system'"),
        (b"(S'x'\niposix\nsystem\n.", "it name 'posix system'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "it use STACK_GLOBAL"),
        (b"\x80\x02\x82\x01.", "it use EXT1"),
        (b"\x80\x02\x83\x01\x00.", "it use EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "it use EXT4"),
        (b"(ctorch\nSize\no.", "it use OBJ"),
        (b"\x80\x02ctorch\nSize\n)\x81.", "it use NEWOBJ"),
        (b"\x80\x04ctorch\nSize\n)}\x92.", "it use NEWOBJ_EX"),
        (b"\xff\xff", "it cannot be decoded"),
        (b"", "it cannot be decoded"),
    ],
)
def test_what_could_run_code_is_refused_before_it_is_read(pickled: bytes, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_pickle(torch_archive(pickled), "it")
    assert caught.value.what.startswith(says)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "payload", [torch_archive(), torch_archive(b"N.", b"N."), torch_archive(b"N.", packed=True)]
)
def test_only_one_unpacked_pickle_is_looked_at(payload: bytes) -> None:
    check_pickle(torch_archive(b"N."), "it")
    with pytest.raises(UnsupportedError, match=r"it are not one torch\.save archive"):
        check_pickle(payload, "it")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_file(tmp_path_factory.mktemp("foreign"))


def with_samples(path: Path, folder: Path, payload: bytes) -> Path:
    def edit(entries: dict[str, bytes]) -> None:
        root = next(iter(entries)).partition("/")[0]
        entries[f"{root}/data/sample_inputs/model.pt"] = payload

    return edited(path, folder, edit)


def test_torch_reads_samples_by_its_restricted_reader_whatever_the_check_let_pass(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second wall stands also where the first has a hole."""
    bomb = f"cposix\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.".encode()
    path = with_samples(foreign, tmp_path, torch_archive(bomb))
    monkeypatch.setattr(reader, "check_pickle", lambda payload, what: None)
    with pytest.raises(UsageError, match="its sample inputs: "):
        load(path)
    assert not (tmp_path / "ran").exists()


# -- structures -----------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])
torch.utils._pytree._register_namedtuple(Pair, serialized_type_name="tests.Pair")


@dataclass
class Both:
    first: Tensor
    second: list[Tensor]
    third: Tensor | None = None


torch.export.register_dataclass(Both, serialized_type_name="tests.Both")


def ordered(x: Tensor) -> Any:
    return OrderedDict([("b", x + 1), ("a", x + 2)])


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: [x + 1, x + 2],
    "tuple": lambda x: (x + 1, (x + 2,)),
    "dict": lambda x: {"b": x + 1, "a": x + 2},
    "ordered": ordered,
    "default": lambda x: defaultdict(list, {"b": x + 1, "a": x + 2}),
    "dataclass": lambda x: Both(x + 1, [x + 2]),
    "named": lambda x: Pair(x + 1, [x + 2]),
}


@pytest.mark.parametrize("kind", list(RESULTS))
def test_a_result_comes_back_in_its_structure(kind: str, tmp_path: Path) -> None:
    class Result(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return RESULTS[kind](x)

    path = tmp_path / "p.pt2"
    torch.export.save(torch.export.export(Result().eval(), (torch.zeros(2),)), path)
    program = load(path)
    expected, found = RESULTS[kind](torch.ones(2)), program(torch.ones(2))
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    leaves = torch.utils._pytree.tree_leaves
    assert [v.tolist() for v in leaves(found)] == [v.tolist() for v in leaves(expected)]
    assert program.remarks == ()


def test_a_namedtuple_that_nobody_registered_becomes_a_dict_by_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Pair(x + 1, x + 2)

    path = tmp_path / "p.pt2"
    torch.export.save(torch.export.export(Result().eval(), (torch.zeros(2),)), path)
    known = torch.utils._pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    monkeypatch.delitem(known, "tests.Pair")
    program = load(path)
    found = program(torch.ones(2))
    assert {key: v.tolist() for key, v in found.items()} == {"0": [2.0, 2.0], "1": [3.0, 3.0]}
    assert "tests.Pair is not known" in program.remarks[-1]


def test_keyword_samples_come_back_as_keywords(tmp_path: Path) -> None:
    class Keyword(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return x * scale

    x, scale = torch.ones(2), torch.full((2,), 3.0)
    path = tmp_path / "p.pt2"
    torch.export.save(torch.export.export(Keyword().eval(), (x,), {"scale": scale}), path)
    program = load(path)
    assert [v.tolist() for v in program.samples[0]] == [x.tolist(), scale.tolist()]
    assert torch.equal(program(x, scale=x), x)


def test_a_file_with_two_top_folders_is_refused(foreign: Path, tmp_path: Path) -> None:
    for name in ("aaa/more", "zzz/more"):
        path = edited(foreign, tmp_path, lambda entries, name=name: entries.update({name: b""}))  # type: ignore[misc]
        with pytest.raises(UsageError, match=r"not an archive of torch\.export\.save"):
            load(path)


def test_a_file_without_samples_is_refused_with_a_hint(foreign: Path, tmp_path: Path) -> None:
    for payload in (b"", saved(None)):
        with pytest.raises(Exception, match="carries no example inputs"):
            load(with_samples(foreign, tmp_path, payload))


def test_samples_are_taken_as_they_were(foreign: Path, tmp_path: Path) -> None:
    x = torch.arange(10.0).reshape(5, 2)
    program = load(with_samples(foreign, tmp_path, saved(((x,), {}))))
    assert torch.equal(program.samples[0][0], x)
    torch.manual_seed(0)
    expected = Small().eval()(x)
    assert torch.equal(program(x)["y"], expected["y"])


# -- classes by name ------------------------------------------------------------------------------


class Outer:
    class Inner:
        """Known by a name with a dot in it."""


def test_a_class_is_known_by_its_qualified_name() -> None:
    assert known_class(class_name(Outer.Inner)) is Outer.Inner
    assert known_class(f"{__name__}:Outer.Other") is None
    assert known_class(f"{__name__}:X") is None
    assert known_class("nowhere.to.be:Found") is None


def test_a_namedtuple_whose_fields_changed_is_made_anew() -> None:
    data = {"kind": "namedtuple", "class": class_name(Pair), "children": [None, None]}
    same = spec_from_json({**data, "keys": ["first", "second"]}, [])
    other = spec_from_json({**data, "keys": ["left", "right"]}, [])
    leaves = [1, 2]
    assert type(torch.utils._pytree.tree_unflatten(leaves, same)) is Pair
    made = torch.utils._pytree.tree_unflatten(leaves, other)
    assert made._asdict() == {"left": 1, "right": 2}


def test_defaults_after_one_that_cannot_be_stored_are_kept(tmp_path: Path) -> None:
    class Defaults(nn.Module):
        def forward(self, x: Tensor, hook: Any = print, flag: bool = False) -> Tensor:
            return x + 1

    x = torch.zeros(2)
    save(capture(Defaults().eval(), (x,)), tmp_path / "p.pt2")
    program = load(tmp_path / "p.pt2")
    assert torch.equal(program(x, flag=False), x + 1)
    with pytest.raises(UsageError, match="unknown input 'hook'"):
        program(x, hook=print)
