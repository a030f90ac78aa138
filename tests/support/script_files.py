"""Files of plain torch for tests: written by planish, loaded with nothing but torch."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import planish
from planish.ir.compare import difference

Call = tuple[tuple[Any, ...], dict[str, Any]]

_CHILD = """
import sys
sys.modules["planish"] = None  # importing it raises
import torch
path = sys.argv[1]
module = {opened}
made = []
for args, kwargs in torch.load(sys.argv[2], weights_only=True):
    made.append([t for t in torch.utils._pytree.tree_leaves(module(*args, **kwargs))])
torch.save(made, sys.argv[3])
"""


class Calls(nn.Module):
    """A module whose forward is a function of itself and the inputs; it holds what it is given."""

    def __init__(self, function: Callable[..., Any], **held: nn.Module | Tensor):
        super().__init__()
        for name, value in held.items():
            if isinstance(value, (nn.Module, nn.Parameter)):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)
        self.function = function
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def module(function: Callable[..., Any], **held: nn.Module | Tensor) -> nn.Module:
    """A module with ``function`` for its forward, so that its inputs keep their names."""
    own = type("Own", (Calls,), {"forward": function})
    made: nn.Module = own(function, **held)
    return made


def written(
    model: nn.Module,
    path: Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> planish.Optimized:
    """Export a model as it is traced; ``options`` go to ``optimize``."""
    options = {"recipe": "none", "target": "torchscript", **options}
    result = planish.optimize(model, (tuple(args), dict(kwargs or {})), **options)
    result.export(path)
    return result


OPENED = {
    "torchscript": "torch.jit.load(path)",
    "torch-export": "torch.export.load(path).module()",
    "aotinductor": "torch._inductor.aoti_load_package(path)",
}


def answers_of(path: Path, calls: Sequence[Call], target: str = "torchscript") -> list[list[Any]]:
    """Flat outputs of a file in a fresh process that cannot import planish, one list a call."""
    child = _CHILD.format(opened=OPENED[target])
    given, made = path.with_suffix(".in"), path.with_suffix(".out")
    torch.save([(tuple(args), dict(kwargs)) for args, kwargs in calls], given)
    command = [sys.executable, "-W", "ignore", "-c", child, str(path), str(given), str(made)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    result: list[list[Any]] = torch.load(made, weights_only=True)
    return result


def agrees(
    model: nn.Module,
    path: Path,
    args: Sequence[Any] = (),
    others: Sequence[Any] = (),
    **options: Any,
) -> planish.Optimized:
    """Export, and hold what plain torch makes of the file against the model.

    Args:
        model: takes its inputs by position.
        path: where the file goes.
        args: the sample.
        others: further inputs, of other sizes or values.
        options: for ``optimize``.
    """
    from torch.utils import _pytree as pytree

    result = written(model, path, args, **options)
    loaded = torch.jit.load(str(path))
    for inputs in (tuple(args), *others):
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*inputs))
        found = pytree.tree_leaves(loaded(*inputs))
        assert difference(expected, found) is None
    return result
