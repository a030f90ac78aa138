"""The checking loader: ``.pt2`` files that ``torch.export.save`` wrote, opened without unpickling.

``torch.export.load`` unpickles what it finds. Here the archive is read by planish itself: the graph
from its JSON (``planish.ir.graphjson`` checks it), weights and constants from raw bytes. Torch
stores the sample inputs as a ``torch.save`` archive only; that one is decoded by torch's restricted
``weights_only`` reader, after its opcodes were seen to name nothing but tensors.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from planish.ir.archive import Archive
from planish.ir.capture import from_exported
from planish.ir.errors import PlanishError, UnsupportedError
from planish.ir.graphcheck import UnsafeGraphError, check_constant_name
from planish.ir.program import Program
from planish.ir.trees import known_class, spec_from_json

# What a pickle of plain tensors names, and nothing else.
_TENSOR_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        "torch device",
        "torch.storage UntypedStorage",
        *(
            f"torch {kind}Storage"
            for kind in (
                "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat "
                "ComplexDouble"
            ).split()
        ),
    }
)
_ADVICE = "export it again here, or save it with planish.ir.save, which pickles nothing"


def load_foreign(archive: Archive) -> Program:
    """A program from the ``.pt2`` file of ``torch.export.save``.

    Raises:
        UsageError: the file is damaged or no exported program.
        UnsupportedError: part of it could only be read by unpickling, or it holds several programs,
            compiled code or script objects.
    """
    reader = _Reader(archive)
    try:
        program = from_exported(reader.exported_program())
    except PlanishError:
        raise
    except UnsafeGraphError as error:
        raise archive.damaged(str(error)) from error
    except Exception as error:  # torch's reader fails in its own ways at JSON it did not write
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        raise archive.damaged(f"{type(error).__name__}: {line}") from error
    program.remarks += tuple(reader.remarks)
    return program


class _Reader:
    """One archive in torch's layout: everything below one folder named after the file."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.remarks: list[str] = []
        names = archive.names
        roots = {PurePosixPath(name).parts[0] for name in names if name}
        if "serialized_exported_program.json" in names:
            raise UnsupportedError(
                f"{archive.path} was saved by a torch that pickled weights", hint=_ADVICE
            )
        self.root = next(iter(roots)) + "/" if len(roots) == 1 else ""
        if self._text("archive_format") != "pt2":
            raise archive.damaged("it is not an archive of torch.export.save or planish")
        if (version := self._text("archive_version")) != "0":
            raise UnsupportedError(
                f"{archive.path} has archive version {version}; this planish reads version 0",
                hint=_ADVICE,
            )
        if self._text("byteorder") != "little":
            raise UnsupportedError(f"{archive.path} holds big-endian numbers", hint=_ADVICE)
        self.model = self._only_model()

    def _text(self, name: str) -> str:
        if self.root + name not in self.archive.names:
            return ""
        return self.archive.read(self.root + name)[:100].decode("utf-8", "replace").strip()

    def _only_model(self) -> str:
        inside = [n.removeprefix(self.root) for n in self.archive.names]
        if any(n.startswith(("data/aotinductor/", "data/executorch/")) for n in inside):
            raise UnsupportedError(
                f"{self.archive.path} holds compiled code, which planish does not run", hint=_ADVICE
            )
        models = [n for n in inside if n.startswith("models/") and n.endswith(".json")]
        if len(models) != 1:
            listed = ", ".join(sorted(models)) or "none"
            raise UnsupportedError(
                f"{self.archive.path} holds {len(models)} exported programs ({listed}), not one",
                hint="save one program per file",
            )
        return models[0].removeprefix("models/").removesuffix(".json")

    def exported_program(self) -> ExportedProgram:
        """Everything put together.

        Raises:
            UnsafeGraphError, and whatever torch's reader raises.
        """
        from planish.ir.graphjson import graph_from_json

        # Payloads first: a file that wants to be unpickled is refused before anything is built.
        state = self._payloads("weights")
        constants = self._payloads("constants")
        example = self._example()
        data = self.archive.json(f"{self.root}models/{self.model}.json")
        call = data["graph_module"]["module_call_graph"][0]["signature"]
        in_spec = _tree(call["in_spec"], self.remarks)
        out_spec = _tree(call["out_spec"], self.remarks)
        names = call.get("forward_arg_names")
        exported = graph_from_json(data, state, constants, example)
        signature = exported.module_call_graph[0].signature
        assert signature is not None
        signature.in_spec, signature.out_spec = in_spec, out_spec
        signature.forward_arg_names = [str(name) for name in names] if names else None
        return exported

    # -- payloads -----------------------------------------------------------------------------

    def _payloads(self, kind: str) -> dict[str, Tensor]:
        """The tensors that ``data/{kind}/{model}_{kind}_config.json`` lists."""
        folder = f"{self.root}data/{kind}/"
        if f"{folder}{self.model}.pt" in self.archive.names:
            raise UnsupportedError(
                f"{self.archive.path}: its {kind} are one pickle, as older torch saved them",
                hint=_ADVICE,
            )
        config = self.archive.json(f"{folder}{self.model}_{kind}_config.json")["config"]
        for name, entry in config.items():
            check_constant_name(name)
            if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                raise UnsupportedError(
                    f"{self.archive.path}: {name!r} is stored as a pickle, which could run any "
                    "code when it is read",
                    hint=_ADVICE,
                )
        storages: dict[str, bytearray] = {}
        tensors: dict[str, Tensor] = {}
        found = {}
        for name, entry in config.items():
            path = folder + entry["path_name"]
            if path not in storages:
                storages[path] = bytearray(self.archive.read(path))
            key = json.dumps(entry, sort_keys=True)
            if key not in tensors:  # tied weights stay tied
                tensor = _tensor(storages[path], entry["tensor_meta"])
                tensors[key] = nn.Parameter(tensor, False) if entry["is_param"] else tensor
            found[name] = tensors[key]
        return found

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        name = f"{self.root}data/sample_inputs/{self.model}.pt"
        if name not in self.archive.names or not (payload := self.archive.read(name)):
            return None
        what = f"{self.archive.path}: its sample inputs"
        check_pickle(payload, what)
        try:
            example = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged payload fails in many ways
            raise self.archive.damaged(f"its sample inputs: {error}") from error
        if example is None:
            return None
        args, kwargs = example
        return tuple(args), dict(kwargs or {})


def check_pickle(payload: bytes, what: str) -> None:
    """Refuse a ``torch.save`` archive that names anything but tensors, without reading it.

    Raises:
        UnsupportedError: says what it names. ``what`` is the subject of the message.
    """
    refusal = "could only be read by running code they bring along"
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as inner:
            pickles = [n for n in inner.namelist() if n.endswith(".pkl")]
            packed = any(e.compress_type != zipfile.ZIP_STORED for e in inner.infolist())
            if len(pickles) != 1 or packed:
                raise UnsupportedError(f"{what} are not one torch.save archive", hint=_ADVICE)
            opcodes = list(pickletools.genops(inner.read(pickles[0])))
    except UnsupportedError:
        raise
    except zipfile.BadZipFile as error:
        raise UnsupportedError(f"{what} are a bare pickle and {refusal}", hint=_ADVICE) from error
    except Exception as error:  # pickletools raises ValueError, IndexError, ... at nonsense
        raise UnsupportedError(f"{what} cannot be decoded: {error}", hint=_ADVICE) from error
    for opcode, argument, _ in opcodes:
        named = opcode.name in ("GLOBAL", "INST")
        if named and argument not in _TENSOR_GLOBALS:
            raise UnsupportedError(f"{what} name {str(argument)!r} and {refusal}", hint=_ADVICE)
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            raise UnsupportedError(f"{what} use {opcode.name} and {refusal}", hint=_ADVICE)


def _tensor(storage: bytearray, meta: dict[str, Any]) -> Tensor:
    """A view of raw storage bytes as torch's ``TensorMeta`` describes it.

    Raises:
        ValueError, RuntimeError: it reaches beyond the bytes.
    """
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
    size, stride = ([dim["as_int"] for dim in meta[key]] for key in ("sizes", "strides"))
    if not storage:
        if 0 not in size:
            raise ValueError("a tensor has no bytes")
        return torch.empty(size, dtype=dtype)
    flat = torch.frombuffer(storage, dtype=torch.uint8).view(dtype)
    return torch.as_strided(flat, size, stride, meta["storage_offset"]["as_int"]).clone()


# -- pytrees --------------------------------------------------------------------------------------


def _tree(text: str, remarks: list[str]) -> TreeSpec:
    """Torch's own JSON of a pytree, read by planish's rules."""
    version, data = json.loads(text)
    if version != 1:
        raise ValueError(f"unknown version {version} of a pytree")
    return spec_from_json(_to_own(data), remarks)


def _to_own(data: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    """Torch's JSON of a pytree as the JSON of ``planish.ir.trees``."""
    name = data["type"]
    if name is None:
        return None
    children = [_to_own(child) for child in data["children_spec"]]
    context = _context(data["context"])
    if name in ("builtins.tuple", "builtins.list"):
        return {"kind": name.removeprefix("builtins."), "context": None, "children": children}
    if name in ("builtins.dict", "collections.OrderedDict"):
        kind = name.rpartition(".")[2]
        return {"kind": kind, "context": {"list": context}, "children": children}
    if name == "collections.defaultdict":
        keyed = [context["default_factory_name"], {"list": context["dict_context"]}]
        return {"kind": "defaultdict", "context": keyed, "children": children}
    if name == "collections.namedtuple":
        cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(str(context))
        if cls is not None:
            named = {"class": f"{cls.__module__}:{cls.__qualname__}", "keys": list(cls._fields)}
            return {"kind": "namedtuple", **named, "children": children}
        name, context = str(context), None  # the file holds no field names
    cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    qualified = f"{cls.__module__}:{cls.__qualname__}" if cls is not None else name
    keys = _keys(context, len(children))
    return {
        "kind": "class",
        "class": qualified if known_class(qualified) is cls else name,
        "context": _encoded(context),
        "keys": keys,
        "children": children,
    }


def _context(raw: Any) -> Any:  # noqa: ANN401 - any JSON
    """What a class keeps beside its children: JSON in a string, or as its own writer left it.

    That of a namedtuple is its bare name, that of a defaultdict an object.
    """
    try:
        return json.loads(raw) if isinstance(raw, str) and raw else raw
    except json.JSONDecodeError:
        return raw


def _encoded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """JSON as ``planish.ir.trees.encode`` would write it."""
    if isinstance(value, list):
        return {"list": [_encoded(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _encoded(v)] for k, v in value.items()]}
    return {"float": value.hex()} if isinstance(value, float) else value


def _keys(context: Any, count: int) -> list[str]:  # noqa: ANN401 - any JSON
    for candidate in (context, context[0] if isinstance(context, list) and context else None):
        if isinstance(candidate, list) and len(candidate) == count:
            if all(isinstance(key, str) for key in candidate):
                return candidate
    return [str(position) for position in range(count)]
