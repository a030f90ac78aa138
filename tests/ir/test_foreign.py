"""Files from unknown hands: they open without unpickling, or are refused with one clear error."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planish.ir import load, save, text
from planish.ir.errors import UnsupportedError, UsageError
from planish.ir.graphcheck import UnsafeGraphError, check_operator, check_size
from tests.support.foreign import Edit, Small, edit_json, edited, exported_file
from tests.support.nets import assert_same, branch_program, net_program


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_file(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.pt2"
    save(net_program()[1], path)
    return path


# -- what opens -----------------------------------------------------------------------------------


def test_a_file_of_torch_export_save_opens(foreign: Path) -> None:
    program = load(foreign)
    torch.manual_seed(0)
    model = Small().eval()
    x = torch.randn(5, 2)
    assert_same(model(x), program(x))
    assert program.signature.parameters == ("x",)
    assert program.samples[0][0].shape == (3, 2)


def test_tied_weights_of_a_foreign_file_are_one_constant(foreign: Path) -> None:
    weights = [name for name in load(foreign).constants if name.endswith("weight")]
    assert weights == ["b.weight"]


def test_a_foreign_program_can_be_saved_again(foreign: Path, tmp_path: Path) -> None:
    program = load(foreign)
    save(program, tmp_path / "p.pt2")
    assert text(load(tmp_path / "p.pt2"), values=True) == text(program, values=True)


def test_an_output_class_that_is_not_imported_becomes_a_dict(foreign: Path, tmp_path: Path) -> None:
    def rename(data: Any) -> None:
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["out_spec"])
        spec["type"] = "nowhere.to.be.Found"
        signature["out_spec"] = json.dumps([version, spec])

    program = load(edited(foreign, tmp_path, edit_json("/model.json", rename)))
    assert program(torch.ones(1, 2)).keys() == {"y", "odd", "none"}
    assert "nowhere.to.be.Found is not known" in program.remarks[-1]


# -- planted code ---------------------------------------------------------------------------------


def bomb(marker: Path) -> bytes:
    """A pickle that makes a file when it is read."""
    return f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()


def torch_archive(pickled: bytes, name: str = "archive") -> bytes:
    """A ``torch.save`` archive around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{name}/data.pkl", pickled)
        archive.writestr(f"{name}/byteorder", "little")
        archive.writestr(f"{name}/version", "3\n")
    return buffer.getvalue()


def test_the_planted_pickle_is_live(tmp_path: Path) -> None:
    torch.load(io.BytesIO(torch_archive(bomb(tmp_path / "ran"))), weights_only=False)
    assert (tmp_path / "ran").exists()


def plant(where: str, payload: bytes) -> Edit:
    """Put a payload where torch.export.load would unpickle it."""

    def edit(entries: dict[str, bytes]) -> None:
        root = next(iter(entries)).partition("/")[0]
        if where == "samples":
            entries[f"{root}/data/sample_inputs/model.pt"] = payload
            return
        kind, _, how = where.partition(" ")
        if how == "legacy":
            entries[f"{root}/data/{kind}/model.pt"] = payload
            return
        name = f"{root}/data/{kind}/model_{kind}_config.json"
        config = json.loads(entries[name])
        first = next(iter(config["config"].values()))
        if how == "flag":
            first["use_pickle"] = True
        else:
            first["path_name"] = how
        entries[f"{root}/data/{kind}/{first['path_name']}"] = payload
        entries[name] = json.dumps(config).encode()

    return edit


PLACES = [
    "samples",
    "weights legacy",
    "weights flag",
    "constants legacy",
    "constants flag",
    "constants custom_obj_0",
    "constants opaque_obj_0",
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "archive"])
@pytest.mark.parametrize("where", PLACES)
def test_a_planted_pickle_does_not_run(
    where: str, wrapped: bool, foreign: Path, tmp_path: Path
) -> None:
    payload = bomb(tmp_path / "ran")
    path = edited(foreign, tmp_path, plant(where, torch_archive(payload) if wrapped else payload))
    with pytest.raises(UnsupportedError, match=r"pickle|running code"):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"ccopyreg\n_reconstructor\n.",
        b"ctorch.hub\nload\n.",
        b"(S'x'\niposix\nsystem\n.",
    ],
    ids=["stack", "copyreg", "torch", "inst"],
)
def test_a_pickle_of_samples_may_name_only_tensors(
    pickled: bytes, foreign: Path, tmp_path: Path
) -> None:
    path = edited(foreign, tmp_path, plant("samples", torch_archive(pickled)))
    with pytest.raises(UnsupportedError, match=r"its sample inputs (name|use)"):
        load(path)


def set_size(expression: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        values = data["graph_module"]["graph"]["tensor_values"]
        (size,) = (v for v in values["x"]["sizes"] if "as_expr" in v)
        size["as_expr"]["expr_str"] = expression

    return change


def set_first_node(**fields: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data["graph_module"]["graph"]["nodes"][0].update(fields)

    return change


def set_guard(code: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data["guards_code"] = [code]

    return change


def rename_input(name: str) -> Callable[[Any], Any]:
    return lambda data: json.loads(json.dumps(data).replace('"x"', json.dumps(name)))


def test_code_in_a_symbolic_size_does_not_run(foreign: Path, tmp_path: Path) -> None:
    code = f"__import__('os').system('touch {tmp_path / 'ran'}')"
    path = edited(foreign, tmp_path, edit_json("/model.json", set_size(code)))
    with pytest.raises(UsageError, match="is not a symbolic size"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_guards_are_dropped_not_run(foreign: Path, tmp_path: Path) -> None:
    code = f"__import__('os').system('touch {tmp_path / 'ran'}')"
    program = load(edited(foreign, tmp_path, edit_json("/model.json", set_guard(code))))
    program(torch.ones(1, 2))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.os.system",
        "_operator.attrgetter",
        "math.__loader__",
        "torch.ops.aten.from_file.default",
        "torch.ops.load_library",
        "#extension:op",
        "torch.ops.aten.no_such_operator.default",
    ],
)
def test_only_operators_may_be_called(target: str, foreign: Path, tmp_path: Path) -> None:
    path = edited(foreign, tmp_path, edit_json("/model.json", set_first_node(target=target)))
    with pytest.raises(UsageError, match="it calls"):
        load(path)


def test_a_name_that_would_be_written_into_code_is_refused(foreign: Path, tmp_path: Path) -> None:
    evil = f"x=__import__('os').system('touch {tmp_path / 'ran'}')"
    path = edited(foreign, tmp_path, edit_json("/model.json", rename_input(evil)))
    with pytest.raises(UsageError, match="is not a name of a value"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_an_own_file_is_checked_as_a_foreign_one_is(own: Path, tmp_path: Path) -> None:
    def change(data: Any) -> None:
        for value in data["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = "__import__('os').getcwd()"

    with pytest.raises(UsageError, match="is not a symbolic size"):
        load(edited(own, tmp_path, edit_json("graph.json", change)))
    path = edited(own, tmp_path, edit_json("graph.json", set_first_node(target="torch.hub.load")))
    with pytest.raises(UsageError, match="it calls"):
        load(path)


@pytest.mark.parametrize(
    "expression",
    [
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(10), Integer(99999999))",
        "LShift(Integer(1), Integer(10000000))",
        "Symbol('s0').__class__",
        'Symbol("s0\'+x", integer=True)',
        "lambda: 0",
        "Integer(" * 300 + "1" + ")" * 300,
        "os",
        "1" + "0" * 30,
        "",
    ],
)
def test_sizes_that_are_not_arithmetic_are_refused(expression: str) -> None:
    with pytest.raises(UnsafeGraphError):
        check_size(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s77', positive=True, integer=True))",
        "Add(Integer(-1), FloorDiv(Symbol('u0', integer=True), Integer(16)))",
        "Pow(Symbol('s0', integer=True), Integer(-1))",
        "Max(Integer(1), Symbol('s1', integer=True))",
        "Float('2.5', precision=53)",
    ],
)
def test_sizes_that_torch_writes_are_fine(expression: str) -> None:
    check_size(expression)


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UnsafeGraphError, match="import the library that registers it"):
        check_operator("torch.ops.elsewhere.thing.default")


def test_a_branch_of_a_foreign_file_opens(tmp_path: Path) -> None:
    from planish.ir import to_exported_program

    path = tmp_path / "branch.pt2"
    torch.export.save(to_exported_program(branch_program()), path)
    x = torch.full((2, 3), -1.0)
    torch.testing.assert_close(load(path)(x), branch_program()(x))
