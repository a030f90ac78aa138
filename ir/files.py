"""Programs on disk: one zip file of JSON and tensors, with nothing lost and nothing pickled.

    planish.json           signature, order and provenance of the nodes, remarks, format version
    graph.json             torch's JSON form of the graph (over flat inputs and outputs)
    constants.safetensors  constants; those that share memory are stored once
    samples.safetensors    tensors of the sample inputs

Equal programs give equal files, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils import _pytree as pytree

from planish.ir.archive import (
    Archive,
    Writer,
    json_bytes,
    pack,
    tensors_writer,
    unpack,
    write_archive,
)
from planish.ir.errors import PlanishError, UnsupportedError, UsageError
from planish.ir.exported import to_exported_program
from planish.ir.graphcheck import UnsafeGraphError, check_constant_name
from planish.ir.nodetable import (
    NodeTable,
    body_orders,
    make_writable,
    rebuild,
    reorder_bodies,
    shorten_bodies,
)
from planish.ir.program import Constant, Program, Signature
from planish.ir.tensortype import SparseLayout
from planish.ir.trees import decode, encode, spec_from_json, spec_to_json

FORMAT = "planish program"
VERSION = 1


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a program to a ``.pt2`` file.

    Kept: graph, names, types, constants (with what they share), layouts, signature with dimension
    names, samples, provenance, source lines, remarks. Two calls of ``getitem`` with the same
    operands become one.

    Raises:
        UsageError: the name does not end in ``.pt2``.
        UnsupportedError: the program holds what JSON or safetensors cannot.
        ExportError: the file cannot be written. Nothing is left behind.
    """
    from planish.ir.graphjson import graph_to_json

    path = Path(path)
    if path.suffix != ".pt2":
        raise UsageError(f"{path} does not end in .pt2", hint="programs are saved as NAME.pt2")
    program.absorb_module_edits()
    flat = _flat(program)
    exported = to_exported_program(flat)
    graph = graph_to_json(exported)
    shorten_bodies(graph)
    tensors = {n: c for n, c in flat.constants.items() if isinstance(c, Tensor)}
    stored, constant_rows = pack(tensors)
    sample_tensors, sample_rows, samples = _pack_samples(program)
    shape_env = program.fake_mode.shape_env
    about = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "signature": _signature_to_json(program.signature),
        "nodes": NodeTable.of(program, exported).to_json(),
        "results": _results_to_json(program, exported.graph.output_node().args[0]),
        "bodies": body_orders(flat.constants),
        "order": list(flat.constants),
        "constants": constant_rows,
        "layouts": {
            n: [s.n, s.m, s.axis, list(s.block)] for n, s in sorted(program.layouts.items())
        },
        "samples": samples,
        "sample_tensors": sample_rows,
        "remarks": list(program.remarks),
        "bounds": {
            str(symbol): [_bound(bounds.lower), _bound(bounds.upper)]
            for symbol, bounds in (shape_env.var_to_range.items() if shape_env else ())
            if str(symbol) in graph["range_constraints"]
        },
    }
    entries: list[tuple[str, bytes | Writer]] = [
        ("planish.json", json_bytes(about)),
        ("graph.json", json_bytes(graph)),
        ("constants.safetensors", tensors_writer(stored)),
        ("samples.safetensors", tensors_writer(sample_tensors)),
    ]
    write_archive(path, entries)


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program that ``save`` or ``torch.export.save`` wrote. Nothing in it is unpickled.

    Raises:
        UsageError: there is no such file, or it is damaged, or no program.
        UnsupportedError: it is of a newer version, or holds what only unpickling could read.
    """
    with Archive(Path(path)) as archive:
        if "planish.json" in archive.names:
            return _load_own(archive)
        from planish.ir.foreign import load_foreign

        return load_foreign(archive)


def _load_own(archive: Archive) -> Program:
    about = archive.json("planish.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise archive.damaged("planish.json is not that of a program")
    if about.get("version") != VERSION:
        raise UnsupportedError(
            f"{archive.path} has format version {about.get('version')}; this planish reads "
            f"version {VERSION}",
            hint="load it with the planish that wrote it, or update this one",
        )
    graph = archive.json("graph.json")
    stored = archive.tensors("constants.safetensors")
    sample_tensors = archive.tensors("samples.safetensors")
    try:
        return _assemble(about, graph, stored, sample_tensors)
    except PlanishError:
        raise
    except UnsafeGraphError as error:
        raise archive.damaged(str(error)) from error
    except Exception as error:  # torch's reader fails in its own ways at JSON it did not write
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        raise archive.damaged(f"{type(error).__name__}: {line}") from error


def _assemble(
    about: dict[str, Any],
    graph: dict[str, Any],
    stored: dict[str, Tensor],
    sample_tensors: dict[str, Tensor],
) -> Program:
    from planish.ir.graphjson import graph_from_json

    remarks: list[str] = list(about["remarks"])
    signature = _signature_from_json(about["signature"], remarks)
    for row in about["constants"]:
        check_constant_name(row["name"])
    tensors = unpack(stored, about["constants"])
    # Torch's reader takes these for what shapes may be simplified by.
    graph["range_constraints"] = {
        name: {"min_val": low, "max_val": high} for name, (low, high) in about["bounds"].items()
    }
    exported = graph_from_json(graph, tensors, {})
    bodies = reorder_bodies(exported.graph_module, about["bodies"])
    known: dict[str, Constant] = {**tensors, **bodies}
    constants = {name: known[name] for name in about["order"]}
    table = NodeTable.from_json(about["nodes"])
    new: Graph = rebuild(exported, table, about["results"], decode)
    program = Program(
        new,
        constants,
        signature,
        layouts={name: _layout(*row) for name, row in about["layouts"].items()},
        remarks=tuple(remarks),
    )
    packed = unpack(sample_tensors, about["sample_tensors"])
    program.samples = tuple(
        tuple(packed[v["tensor"]] if "tensor" in v else decode(v["value"]) for v in sample)
        for sample in about["samples"]
    )
    _check(program)
    return program


def _layout(n: int, m: int, axis: int | None, block: list[int]) -> SparseLayout:
    return SparseLayout(n, m, axis, (block[0], block[1]))


def _check(program: Program) -> None:
    """Refuse parts that do not fit each other.

    Raises:
        ValueError: says which.
    """
    signature = program.signature
    if len(program.placeholders) != len(signature.tensor_names):
        raise ValueError("the graph and the signature have different inputs")
    if len(program.results) != signature.out_spec.num_leaves:
        raise ValueError("the graph and the signature have different outputs")
    if signature.in_spec.num_leaves != len(signature.input_names):
        raise ValueError("the inputs and their names differ in number")
    for node in program.graph.find_nodes(op="get_attr"):
        tensor, value = program.constant(node), node.meta.get("val")
        if tensor is None or not isinstance(value, Tensor):
            continue
        if (tensor.dtype, tensor.shape) != (value.dtype, value.shape):
            raise ValueError(f"constant {node.target} is not of the type the graph says")


# -- parts ----------------------------------------------------------------------------------------


def _flat(program: Program) -> Program:
    """The program over a flat tuple of inputs, with only computed outputs and bare nodes.

    What is taken away here is what ``planish.json`` holds.
    """
    flat = program.clone()
    flat.drop_dead_constants()
    for node in flat.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        make_writable(node)
    output = flat.output
    output.args = (tuple(v for v in flat.results if isinstance(v, torch.fx.Node)),)
    inputs = tuple(node.name for node in flat.placeholders)
    flat.signature = replace(
        program.signature,
        parameters=(),
        positional=len(inputs),
        input_names=inputs,
        fixed={},
        in_spec=pytree.tree_structure(((0,) * len(inputs), {})),
        out_spec=pytree.tree_structure((0,) * len(flat.results)),
    )
    flat.samples = ()
    return flat


def _bound(value: Any) -> int | None:  # noqa: ANN401 - a sympy number
    return int(value) if value.is_Integer else None


def _results_to_json(program: Program, computed: Any) -> list[Any]:  # noqa: ANN401 - nodes
    names = iter(node.name for node in computed)
    return [
        {"node": next(names)}
        if isinstance(value, torch.fx.Node)
        else {"value": encode(value, "an output")}
        for value in program.results
    ]


def _pack_samples(
    program: Program,
) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[list[Any]]]:
    tensors: dict[str, Tensor] = {}
    structure: list[list[Any]] = []
    names = program.signature.tensor_names
    for number, sample in enumerate(program.samples):
        row: list[Any] = []
        for name, value in zip(names, sample, strict=True):
            if isinstance(value, Tensor):
                key = f"{number}.{name}"
                tensors[key] = value
                row.append({"tensor": key})
            else:
                row.append({"value": encode(value, f"sample input {name!r}")})
        structure.append(row)
    stored, rows = pack(tensors)
    return stored, rows, structure


def _signature_to_json(signature: Signature) -> dict[str, Any]:
    return {
        "parameters": list(signature.parameters),
        "positional": signature.positional,
        "input_names": list(signature.input_names),
        "fixed": [
            [position, encode(value, f"input {signature.input_names[position]!r}")]
            for position, value in sorted(signature.fixed.items())
        ],
        "in_spec": spec_to_json(signature.in_spec, "the inputs"),
        "out_spec": spec_to_json(signature.out_spec, "the outputs"),
        "output_names": list(signature.output_names),
        "symbols": dict(signature.symbols),
        "ranges": {name: list(bounds) for name, bounds in signature.ranges.items()},
        "defaults": _defaults_to_json(signature.defaults),
    }


def _defaults_to_json(defaults: Mapping[str, object]) -> dict[str, Any]:
    """Defaults that are plain values. They only let a caller pass one explicitly."""
    kept = {}
    for name, value in defaults.items():
        try:
            kept[name] = encode(value, name)
        except UnsupportedError:
            continue  # a function or an object: it has no equal after loading
    return kept


def _signature_from_json(data: dict[str, Any], remarks: list[str]) -> Signature:
    return Signature(
        parameters=tuple(data["parameters"]),
        positional=int(data["positional"]),
        input_names=tuple(data["input_names"]),
        fixed={position: decode(value) for position, value in data["fixed"]},
        in_spec=spec_from_json(data["in_spec"], remarks),
        out_spec=spec_from_json(data["out_spec"], remarks),
        output_names=tuple(data["output_names"]),
        symbols={str(k): str(v) for k, v in data["symbols"].items()},
        ranges={name: (low, high) for name, (low, high) in data["ranges"].items()},
        defaults={name: decode(value) for name, value in data["defaults"].items()},
    )
