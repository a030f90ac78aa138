"""Linears of 2:4 weights through torch's semi-structured sparse kernels, on GPUs that have them.

Tensor cores since NVIDIA's Ampere (compute capability 8.0) multiply a matrix of which two of four
neighbors along the summed axis are zero in half of the steps: they read what stays, and where each
of it stood. ``sparse_module`` stores the weights so; everything else computes as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import UnsupportedError
from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout, dtype_name
from planish.ir.verify_schemes import layout_problem
from planish.model import OptimizedModule

LEAST_CAPABILITY = (8, 0)
# Both kernel libraries that torch may use take weights of these multiples, in halves.
ROWS, COLUMNS = 32, 64
_DTYPES = (torch.float16, torch.bfloat16)
_PATTERN = SparseLayout(2, 4, 1)


@dataclass(frozen=True)
class Choice:
    """Which weights can go through the sparse kernels.

    Attributes:
        sparse: names of constants, each with the linears that read it.
        dense: names of the other constants that claim a layout, and why they stay.
    """

    sparse: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)


def choose(program: Program) -> Choice:
    """Sort the sparse weights of a program by whether the kernels take them."""
    sparse: dict[str, tuple[str, ...]] = {}
    dense: dict[str, str] = {}
    for name in program.layouts:
        sources = [n for n in program.graph.find_nodes(op="get_attr") if n.target == name]
        readers = sorted({user for source in sources for user in source.users})
        problem = _problem(program, name, sources, readers)
        if problem is None:
            sparse[name] = tuple(reader.name for reader in readers)
        else:
            dense[name] = problem
    return Choice(sparse, dense)


def _problem(program: Program, name: str, sources: list[Node], readers: list[Node]) -> str | None:
    """Why a constant stays dense, or None."""
    value = program.constants[name]
    if not isinstance(value, Tensor):
        return "it is no tensor"
    for reader in readers:
        if not is_op(reader, aten.linear.default) or reader.args[1] not in sources:
            return f"{reader.name} reads it, which is no linear"
        if any(operand in sources for operand in (reader.args[0], *reader.args[2:])):
            return f"{reader.name} reads it as more than its weight"
    if value.dtype not in _DTYPES:
        return f"it is {dtype_name(value.dtype)}, not f16 or bf16: cast-half behind sparsify helps"
    if layout_problem(value, _PATTERN) is not None:
        return f"it is {program.layouts[name]}, not 2:4 along its inputs"
    rows, columns = value.shape
    if rows % ROWS or columns % COLUMNS:
        return f"it is {rows} x {columns}, no multiple of {ROWS} x {COLUMNS}"
    return None


def check_gpu(device: str | torch.device) -> torch.device:
    """The GPU, if its tensor cores know 2:4.

    Raises:
        UnsupportedError: it is no GPU, there is none, or it is too old.
    """
    found = torch.device(device)
    hint = "an NVIDIA GPU of compute capability 8.0 or later has them: sparse_model('cuda')"
    if found.type != "cuda":
        raise UnsupportedError(f"{found} has no kernels for 2:4 weights", hint=hint)
    if not torch.cuda.is_available():
        raise UnsupportedError("torch sees no CUDA GPU, which sparse kernels need", hint=hint)
    if (found.index or 0) >= torch.cuda.device_count():  # no index: the first
        raise UnsupportedError(f"there is no {found}: {torch.cuda.device_count()} GPUs", hint=hint)
    capability = torch.cuda.get_device_capability(found)
    if capability < LEAST_CAPABILITY:
        raise UnsupportedError(
            "{} has compute capability {}.{}, without sparse tensor cores".format(
                found, *capability
            ),
            hint=hint,
        )
    return found


class SparseModule(OptimizedModule):
    """A program on a GPU, some linears of which multiply by packed 2:4 weights.

    Attributes:
        choice: which weights are packed, and why the others are not.
    """

    def __init__(self, program: Program, device: torch.device, choice: Choice):
        moved = on_device(program, device)
        for name in choice.sparse:  # in the program itself: nothing holds the dense one any longer
            dense = moved.constants[name]
            assert isinstance(dense, Tensor)  # choose looked
            moved.constants[name] = torch.sparse.to_sparse_semi_structured(dense)
            del moved.layouts[name]  # what is packed has no axes to be checked
        super().__init__(moved)
        self.choice = choice


def on_device(program: Program, device: torch.device) -> Program:
    """A copy whose constants, and what its operators make, lie on a device."""
    moved = program.clone()
    for name, value in moved.constants.items():
        if isinstance(value, Tensor):
            moved.constants[name] = value.to(device).contiguous()
    for node in moved.operators:
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {
            name: device if isinstance(a, torch.device) else a for name, a in node.kwargs.items()
        }
    moved.touch()
    return moved


def sparse_module(program: Program, device: str | torch.device) -> SparseModule:
    """A copy of a program on a GPU, its 2:4 linears through the sparse kernels.

    Args:
        program: with weights that claim layouts.
        device: "cuda" or "cuda:1".

    Raises:
        UnsupportedError: the device cannot do it, or no weight of the program can be packed;
            says why for each.
    """
    found = check_gpu(device)
    choice = choose(program)
    if not choice.sparse:
        reasons = "; ".join(f"@{name}: {why}" for name, why in list(choice.dense.items())[:3])
        raise UnsupportedError(
            f"no weight can be packed as 2:4: {reasons or 'none is sparse'}",
            hint="recipe 'sparsify, cast-half' makes linears of 2:4 weights in f16",
        )
    return SparseModule(program, found, choice)
