"""What a sweep is fed with: batches of calibration inputs, their samples and their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import RequirementError, UsageError
from planish.ir.program import Program
from planish.passes.observe.layout import Layout, dims, layout

Tell = Callable[[int, int], None]


class Batches(Protocol):
    """Calibration inputs as ``planish.passes.calibrate.Spool`` gives them."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Flat inputs, one tuple per batch; every iteration begins at the first."""

    def __len__(self) -> int:
        """How many batches there are."""


def required(calibration: Batches | None) -> Batches:
    """The calibration inputs.

    Raises:
        RequirementError: there are none.
    """
    if calibration is None or not len(calibration):
        raise RequirementError(
            "ranges of values can only be measured on calibration inputs, and there are none",
            hint="pass calibration=... : an iterable of inputs that look like real ones",
        )
    return calibration


@dataclass(frozen=True)
class Padding:
    """Where samples and padding of a batch are read from.

    Attributes:
        inputs: position of the input that counts the samples, None if no input has an axis.
        mask: whether that input is a mask of padding.
        batch: its number of samples as declared.
        tokens: its number of tokens as declared, None if it is no mask.
        names: symbol -> dimension name: inputs whose batch has one name may have several symbols.
    """

    inputs: int | None = None
    mask: bool = False
    batch: sympy.Expr | None = None
    tokens: sympy.Expr | None = None
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(program: Program, name: str | None) -> Padding:
        """Find the mask, or without one the input that counts the samples.

        Raises:
            UsageError: the name is no input, or that has not two axes.
        """
        names = program.signature.tensor_names
        symbols = program.signature.symbols
        if name is not None and name not in names:
            raise UsageError(
                f"padding_mask names {name!r}, which is no input of the program",
                hint="its inputs are " + ", ".join(names),
            )
        for position, node in enumerate(program.placeholders):
            declared = node.meta.get("val")
            if not isinstance(declared, Tensor) or (name is not None and names[position] != name):
                continue
            sizes = dims(declared, symbols)
            if name is None and sizes:
                return Padding(position, False, sizes[0], names=symbols)
            if len(sizes) == 2:
                return Padding(position, True, *sizes, names=symbols)
        if name is not None:
            raise UsageError(f"padding_mask names {name!r}, which is not of shape [batch, tokens]")
        return Padding()

    def read(self, inputs: tuple[Any, ...]) -> tuple[int, Tensor | None]:
        """How many samples a batch has, and its mask as bool [samples, tokens]."""
        if self.inputs is None:
            return 1, None
        value = inputs[self.inputs]
        return len(value), value.to(torch.bool) if self.mask else None

    def layout(self, node: Node) -> Layout:
        """How a value of the program is cut into samples and tokens."""
        return layout(dims(node.meta["val"], self.names), self.batch, self.tokens)
