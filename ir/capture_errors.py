"""Why a model cannot be captured, in the user's terms."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planish.ir.calling import Call
from planish.ir.errors import CaptureError, ControlFlowError, PlanishError, UsageError

_TORCH = str(Path(torch.__file__).parent)
_PLANISH = str(Path(__file__).resolve().parent)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, where it did."""
    inner = getattr(model, "_orig_mod", None)
    if type(model).__name__ == "OptimizedModule" and isinstance(inner, nn.Module):
        return inner
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch prints about a failing trace to itself, unless the caller asked for its logs.

    It logs, and prints pieces of graphs to standard error; what matters of them is in the error.
    What the model itself prints passes.
    """
    if "TORCH_LOGS" in os.environ:
        yield
        return
    known = logging.root.manager.loggerDict
    loggers = [logging.getLogger(name) for name in known if name.split(".")[0] == "torch"]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(_refuse)
    try:
        with redirect_stderr(_WithoutGraphs(sys.stderr)):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_refuse)


def _refuse(_record: logging.LogRecord) -> bool:
    return False


class _WithoutGraphs(io.TextIOBase):
    """A stream that swallows the printed code of traced graphs, and the line end after it."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.swallowed = False

    def write(self, text: str, /) -> int:
        is_graph = "def forward(self" in text
        if not is_graph and not (self.swallowed and text == "\n"):
            self.stream.write(text)
        self.swallowed = is_graph
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def check_model(model: object) -> None:
    """Refuse what must not be traced.

    Raises:
        UsageError: not a module.
        CaptureError: TorchScript, training mode, no values, or values that are not numbers.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected an nn.Module, an ExportedProgram or a Program, got {type(model).__name__}",
            hint="pass the model itself, not its state dict, class or file name",
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                "the model is TorchScript" + (f" (submodule {name!r})" if name else ""),
                hint="pass the nn.Module that it was scripted or traced from",
            )
        if module.training:
            kind = type(module).__name__
            raise CaptureError(
                "the model is in training mode"
                + (f" (submodule {name!r}, a {kind})" if name else ""),
                hint="call model.eval() first; dropout and batch norm behave differently there",
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(
                f"{name!r} is on the meta device and has no values",
                hint="load the checkpoint before optimizing",
            )
        if tensor.is_floating_point() and bool(torch.isnan(tensor.detach()).any()):
            bad = int(torch.isnan(tensor.detach()).sum())
            raise CaptureError(
                f"{name!r} holds {bad} NaN of {tensor.numel()} values",
                hint="the checkpoint is damaged or training diverged; load a sound one",
            )


def check_sample(model: nn.Module, call: Call) -> None:
    """Refuse example inputs that live on another device than the model.

    Raises:
        UsageError: names the two devices.
    """
    homes = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    for leaf in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and homes and leaf.device not in homes:
            raise UsageError(
                f"an example input is on {leaf.device}, the model on "
                + ", ".join(sorted(map(str, homes))),
                hint="move both to one device, model.to(...) and input.to(...)",
            )


def user_line(error: BaseException) -> str | None:
    """The innermost frame of the user's own code in a traceback, as ``file:line: code``."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((_TORCH, _PLANISH, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


def fails_itself(error: Exception) -> CaptureError:
    """The error for a model that fails on the example inputs, without being traced."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return CaptureError(
        f"the model itself fails on the example inputs: {type(error).__name__}: {text}",
        where=user_line(error),
        hint="pass inputs of the types, shapes and values that forward takes",
    )


def explain(error: Exception) -> PlanishError:
    """Turn whatever ``torch.export`` raised into one clear error."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    where = user_line(error)
    kind = type(error).__name__
    if "data-dependent" in text or kind == "GuardOnDataDependentSymNode":
        return ControlFlowError(
            "control flow depends on values, not only on shapes",
            where=where,
            hint="a traced graph cannot follow it: use torch.where or torch.cond, or export the "
            "parts around the branch (encoder, one step of a loop) as separate programs",
        )
    if "Constraints violated" in text or "dynamic_shapes" in text or "specialized" in text:
        fixes = re.search(r"Suggested fixes:\n((?:  .*\n?)+)", text)
        cause = re.search(r"^  - (.*)", text, re.M)
        # What follows is advice on torch functions that the caller never called.
        what = re.split(r" If you're using ", cause[1] if cause else first)[0]
        lines = [line.strip() for line in fixes[1].splitlines()] if fixes else []
        return CaptureError(
            f"the model does not work for every size that dynamic_shapes allows: {what}",
            where=where,
            hint=f"in dynamic_shapes, as torch found: {'; '.join(lines)} (a number is a fixed size)"
            if lines
            else "narrow the range, or make the dimension static",
        )
    unknown = re.search(r"(Found|Unsupported input type) <class '([^']+)'>", text)
    if unknown is not None:
        verb = "returns" if unknown[1] == "Found" else "takes"
        return CaptureError(
            f"forward {verb} a {unknown[2]}, which cannot be taken apart into tensors",
            where=where,
            hint="use tuples, lists, dicts, named tuples or dataclasses of tensors, or register "
            "the class with torch.utils._pytree.register_pytree_node",
        )
    if kind == "AssertionError" and "tree_name" in text:
        return CaptureError(
            "torch.export cannot make dimensions of **kwargs inputs dynamic",
            hint="name these inputs in the signature of forward",
        )
    return CaptureError(f"the model could not be traced: {kind}: {first}", where=where)
