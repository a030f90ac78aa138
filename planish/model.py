"""The optimized program as an ``nn.Module`` with the caller's own signature."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from planish.ir.contract import check_inputs
from planish.ir.errors import UsageError
from planish.ir.program import Program


class OptimizedModule(nn.Module):
    """Runs a program; takes the inputs and returns the output structure of the captured model.

    Its state dict holds the program's live constants. It is for inference: no gradients.
    """

    def __init__(self, program: Program):
        super().__init__()
        # A clone, so that handing out this module hands out no way to edit the result.
        self._program = program.clone()
        self.body = self._program.graph_module
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the caller's own types
        """Run with the captured inputs, by position or by name.

        Raises:
            UsageError: an input has another type, or a size that was static at capture: what was
                computed from that size then would be wrong now, and nobody would notice.
        """
        signature = self._program.signature
        flat = signature.flatten(args, kwargs)
        if not torch.compiler.is_compiling():  # whoever traces this module makes guards of its own
            check_inputs(self._program, flat)
        with torch.no_grad():
            return signature.unflatten(tuple(self.body(*flat)))

    def train(self, mode: bool = True) -> OptimizedModule:
        """Only ``train(False)`` is allowed, which changes nothing.

        Raises:
            UsageError: for ``train(True)``.
        """
        if mode:
            self._refuse()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Refused: the constants may be the very tensors of the captured model.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "an optimized model takes no other weights: it shares tensors with the model it was "
            "made from, and others were folded together",
            hint="load them into the original model, then optimize it again",
        )

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "an optimized model is for inference and cannot be put in training mode",
            hint="train the original model, then optimize it again",
        )

    def extra_repr(self) -> str:
        """Inputs and outputs by name."""
        signature = self._program.signature
        return f"inputs={list(signature.tensor_names)}, outputs={list(signature.output_names)}"
