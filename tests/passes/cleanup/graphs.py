"""Programs that tracing does not give: edited by hand after capture, as another pass would."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter


class Of(nn.Module):
    """A function as a module; keyword arguments become parameters or buffers of that name."""

    def __init__(self, function: Callable[..., Any], **tensors: Any):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Any, y: Any = None) -> Any:
        tensors = dict(self.named_parameters(remove_duplicate=False))
        tensors.update(self.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
        return self.function(x, **tensors) if y is None else self.function(x, y, **tensors)


def captured(module: nn.Module, *args: Any, dynamic_shapes: Any = None) -> Program:
    """A program to edit."""
    return capture(module.eval(), args, dynamic_shapes=dynamic_shapes)


def edited(program: Program, edit: Callable[[Rewriter, Node], None]) -> Program:
    """Let ``edit`` rewrite at the first operator."""
    rewriter = Rewriter(program, "by-hand")
    root = program.operators[0]
    with rewriter.site("ByHand", root):
        edit(rewriter, root)
    return rewriter.finish()
