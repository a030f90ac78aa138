"""The checks on a graph read from a file, one by one: what passes and what is refused."""

from typing import Any

import pytest

from planish.ir.graphcheck import (
    UnsafeGraphError,
    check_constant_name,
    check_graph,
    check_identifier,
    check_operator,
    check_size,
    walk,
)

POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")


def refused(check: Any, value: Any) -> bool:
    try:
        check(value)
    except UnsafeGraphError:
        return True
    return False


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "zf3",
        "true",
        "oo",
        "-3",
        "2.5",
        str(2**64 - 1),
        "Symbol('s0')",
        "Symbol('s123456789', nonnegative=True, precision=53)",
        "Add(s0, Integer(1), evaluate=False)",
        "Float('-1.5e-10')",
        "Float('0.25', precision=53)",
        "Float(1.5)",
        "Integer()",
        "Pow(s0, Symbol('s1'))",
        "Pow(s0, Rational(1, 2))",
        "Pow(Add(Pow(s0, Integer(2)), Integer(1)), Integer(-1))",
        *(f"{power}(s0, {number})" for power in POWERS for number in (64, -64, "Integer(64)")),
        "Add(" + "s0, " * 4998 + "s12)",
    ],
)
def test_arithmetic_passes(text: str) -> None:
    check_size(text)


@pytest.mark.parametrize(
    "text",
    [
        None,
        3,
        b"s0",
        "s",
        "abcd1",
        "s1234567890",
        "S0",
        "s0x",
        "'s0'",
        "True",
        "None",
        "~3",
        "+3",
        "-s0",
        "-'s0'",
        "2j",
        str(2**64),
        str(-(2**64)),
        "[s0]",
        "s0 + s1",
        "s0.real",
        "s0; s1",
        "print('s0')",
        "print(s0)",
        "Symbol.mro(s0)",
        "Integer(1)(s0)",
        "Add(*s0)",
        "Add(s0, **s1)",
        "Add(s0, (s1 := s2))",
        "Add(s0, print(s1))",
        "Symbol()",
        "Symbol('s0', 's1')",
        "Symbol(s0)",
        "Symbol(3)",
        "Symbol('s0 ')",
        "Symbol('__import__')",
        "Symbol('s0', cls=True)",
        "Symbol('s0', integer='x')",
        "Symbol('s0', integer=1.5)",
        "Symbol('s0', integer=s1)",
        "Float('nan')",
        "Float('1e9999')",
        "Float('1' * 3)",
        "Float('" + "1" * 41 + "')",
        "Float('x')",
        "Float('1', '2')",
        "Add('1.5')",
        "Integer('64')",
        "Pow(s0)",
        "Pow(s0, 'x')",
        "Pow(s0, True)",
        "Pow(s0, s1.f(2))",
        "Pow(s0, 2, 3)",
        "Pow(s0, Add(s0, s1))",
        "Pow(s0, Pow(2, 2))",
        "Pow(s0, s1)",
        "Pow(s0, Integer(65))",
        "Pow(s0, Rational(65, 2))",
        "Pow(s0, Rational(2, 65))",
        "Pow(s0, Integer(Pow(9, 9)))",
        "Pow(print(), 2)",
        *(f"{power}(s0, {number})" for power in POWERS for number in (65, -65, 64.5)),
        "Add(" + "s0, " * 4998 + "s123)",
    ],
)
def test_what_is_not_arithmetic_is_refused(text: Any) -> None:
    with pytest.raises(UnsafeGraphError, match="is not a symbolic size"):
        check_size(text)


@pytest.mark.parametrize("power", POWERS)
def test_powers_of_powers_cannot_blow_up(power: str) -> None:
    """Nine to the power of 64, six times over, would fill any memory."""
    square = f"Add(1, {power}(Add(s0, {power}(s1, 64)), 64))"
    check_size(f"Mul({square}, {square})")
    with pytest.raises(UnsafeGraphError, match="is not a symbolic size"):
        check_size(f"{power}({square}, 2)")
    with pytest.raises(UnsafeGraphError, match="is not a symbolic size"):
        check_size(f"Mul(2, {power}(Integer(Add({square}, 1)), 2))")


def test_a_long_text_is_quoted_in_part() -> None:
    with pytest.raises(UnsafeGraphError) as caught:
        check_size("x" * 1000)
    assert len(str(caught.value)) < 100


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "", "x", "_x1", "args_0"])
def test_identifiers_pass(name: str | None) -> None:
    check_identifier(name)


@pytest.mark.parametrize("name", ["x y", "x=1", "1x", "x\n", "x.y", " ", 0, 3, False, ["x"], {}])
def test_what_is_no_identifier_is_refused(name: Any) -> None:
    with pytest.raises(UnsafeGraphError, match="is not a name of a value"):
        check_identifier(name)


@pytest.mark.parametrize("name", ["a", "layers.0.weight", "a:b/c@d+e-f", "_w", "x" * 1000])
def test_names_of_constants_pass(name: str) -> None:
    check_constant_name(name)


@pytest.mark.parametrize("name", [None, "", 3, "a'b", 'a"b', "a b", "a\n", "a\\", "x" * 1001])
def test_what_could_end_a_string_is_no_name_of_a_constant(name: Any) -> None:
    with pytest.raises(UnsafeGraphError, match="is not a name of a constant"):
        check_constant_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "torch.ops.aten.relu.default",
        "torch.ops.aten.add.Tensor",
        "torch.ops.higher_order.cond",
        "_operator.floordiv",
    ],
)
def test_operators_pass(name: str) -> None:
    check_operator(name)


@pytest.mark.parametrize(
    "name",
    [
        None,
        3,
        "relu",
        "torch.ops.aten.relu",  # all overloads at once
        "torch.ops.aten.relu.no_such_overload",
        "torch.ops.aten.relu.default.__class__",
        "torch.ops.aten.relu.__class__",
        "torch.ops.aten.__class__",
        "torch.ops.higher_order.no_such_operator",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.from_file.out",
        "torch.ops.aten.relu.default ",
        "xtorch.ops.aten.relu.default",
    ],
)
def test_what_is_no_operator_is_refused(name: Any) -> None:
    with pytest.raises(UnsafeGraphError, match="it calls"):
        check_operator(name)


# -- graphs ---------------------------------------------------------------------------------------


def graph(*nodes: Any, **fields: Any) -> dict[str, Any]:
    return {"graph_module": {"graph": {"nodes": list(nodes), **fields}}}


RELU = "torch.ops.aten.relu.default"


def test_only_what_tells_the_source_is_kept_of_a_nodes_metadata() -> None:
    kept = {"stack_trace": "s", "nn_module_stack": "m", "torch_fn": "f"}
    inner: dict[str, Any] = {"target": RELU, "metadata": {**kept, "custom": "c"}}
    bare: dict[str, Any] = {"target": RELU}
    data = graph(inner, bare, inputs=[{"as_graph": graph(dict(inner))["graph_module"]}])
    check_graph(data)
    body = data["graph_module"]["graph"]["inputs"][0]["as_graph"]["graph"]["nodes"][0]
    assert inner["metadata"] == kept == body["metadata"]
    assert bare["metadata"] == {}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "it is not a graph"),
        ([], "it is not a graph"),
        ({}, "it is not a graph"),
        ({"nodes": []}, "it is not a graph"),
        (graph(3), "a node is not an object"),
        (graph({}), "it calls None"),
        (graph({"target": "os.system"}), "it calls 'os.system'"),
        (graph(x=[{"as_operator": "torch.hub.load"}]), "it calls 'torch.hub.load'"),
        (graph(x={"expr_str": "os"}), "is not a symbolic size"),
        (graph(x={"name": "a b"}), "is not a name of a value"),
        (graph(x={"as_name": "a b"}), "is not a name of a value"),
        *(
            (graph(**{f"{kind}_values": {"ok": {}, "a b": {}}}), "is not a name of a value")
            for kind in ("tensor", "sym_int", "sym_bool", "sym_float")
        ),
        *(
            (graph(x={f"{kind}_name": "a'b"}), "is not a name of a constant")
            for kind in ("parameter", "buffer", "tensor_constant")
        ),
        (graph(x={"as_custom_obj": {}}), "it holds a script object"),
        (graph(x=[[{"y": [{"as_name": "a b"}]}]]), "is not a name of a value"),
    ],
)
def test_each_part_of_a_graph_is_checked(data: Any, says: str) -> None:
    with pytest.raises(UnsafeGraphError, match=says):
        check_graph(data)


def test_a_graph_of_legal_parts_passes() -> None:
    value = {"name": "x", "as_name": "y", "expr_str": "Symbol('s0')", "as_operator": RELU}
    constants = {f"{kind}_name": "a.b" for kind in ("parameter", "buffer", "tensor_constant")}
    data = graph({"target": RELU}, x=[value, constants], tensor_values={"x": {}, "y": {}})
    check_graph(data)
    check_graph({"graph_module": {"nodes": 3}})  # no graph, but nothing that could run either


def test_every_entry_is_walked() -> None:
    data = {"a": [{"b": 1}, [{"c": 2}]], "d": {"e": {"f": 3}}}
    assert sorted(key for key, _ in walk(data)) == ["a", "b", "c", "d", "e", "f"]
    assert list(walk([1, "x", None])) == []
