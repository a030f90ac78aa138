"""Torch's JSON form of an exported graph: written, and read only after it was checked.

Torch's reader builds classes that pytrees name, so those in the JSON are made flat tuples before it
sees them; the real ones are kept elsewhere (``planish.ir.trees``). Guards are dropped, since torch
would run them as code. This module imports a good part of torch, so import it where it is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import (
    EnumEncoder,
    ExportedProgramDeserializer,
    ExportedProgramSerializer,
    _dataclass_to_dict,
    _dict_to_dataclass,
)
from torch.export import ExportedProgram

from planish.ir.errors import PlanishError, UnsupportedError
from planish.ir.graphcheck import check_graph, walk


def graph_to_json(exported: ExportedProgram) -> dict[str, Any]:
    """An exported program as torch's JSON, without weights.

    Raises:
        UnsupportedError: it holds a call or a value that has no JSON form.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = ExportedProgramSerializer().serialize(
                exported,
                serialize_state_dict=False,
                serialize_constants=False,
                serialize_example_inputs=False,
            )
        data = json.loads(json.dumps(_dataclass_to_dict(written.exported_program), cls=EnumEncoder))
    except PlanishError:
        raise
    except Exception as error:  # torch raises its own, AssertionError, KeyError, TypeError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first, last = (lines[0], lines[-1]) if lines else ("", type(error).__name__)
        raise UnsupportedError(
            f"torch's JSON form cannot hold this program: {last}",
            where=first if first != last else None,
            hint="this call has no serialized form; rewrite the line of the model it comes from",
        ) from error
    assert isinstance(data, dict)
    # Neither survives reading: guards are never run, and offsets into storage are not types.
    data["guards_code"] = []
    for key, value in walk(data):
        if key == "tensor_values":
            for tensor in value.values():
                tensor["storage_offset"] = {"as_int": 0}
    return data


def graph_from_json(
    data: Any,  # noqa: ANN401 - any JSON
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> ExportedProgram:
    """The exported program behind torch's JSON, with flat tuples as its pytrees.

    Args:
        data: torch's JSON; it is edited.
        state: parameters and persistent buffers by name.
        constants: other tensors by name.
        example: example inputs to attach.

    Raises:
        UnsafeGraphError: it holds what might run code, or an unknown operator.
        Exception: whatever torch's reader raises at JSON that is not its own.
    """
    check_graph(data)
    _flatten_pytrees(data)
    data["guards_code"] = []
    program = _dict_to_dataclass(schema.ExportedProgram, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported: ExportedProgram = ExportedProgramDeserializer().deserialize(
            program, dict(state), dict(constants), None
        )
    exported._example_inputs = example
    return exported


def _flatten_pytrees(data: dict[str, Any]) -> None:
    """Let the root take a flat tuple of inputs and give one of outputs."""
    module = data["graph_module"]
    signature = module["signature"]
    inputs = sum("user_input" in spec for spec in signature["input_specs"])
    outputs = sum("user_output" in spec for spec in signature["output_specs"])
    args = _tuple_spec([_LEAF] * inputs)
    module["module_call_graph"] = [
        {
            "fqn": "",
            "signature": {
                "inputs": [],
                "outputs": [],
                "in_spec": json.dumps([1, _tuple_spec([args, _EMPTY_DICT])]),
                "out_spec": json.dumps([1, _tuple_spec([_LEAF] * outputs)]),
                "forward_arg_names": None,
            },
        }
    ]
    module["treespec_namedtuple_fields"] = {}


_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_EMPTY_DICT = {"type": "builtins.dict", "context": "[]", "children_spec": []}


def _tuple_spec(children: list[Any]) -> dict[str, Any]:
    return {"type": "builtins.tuple", "context": "null", "children_spec": children}
