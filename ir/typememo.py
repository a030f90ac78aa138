"""Types of new calls, each distinct one derived once: the layers of a model repeat themselves."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.node import Argument, Target

from planish.ir.infer import infer
from planish.ir.program import Program
from planish.ir.rederive import call_key

# Operators whose result has a size of its own, a new symbol at every call.
_FRESH = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class TypeMemo:
    """``infer`` for one program, remembering what equal calls on equal types gave."""

    def __init__(self, program: Program):
        self.program = program
        self._known: dict[Hashable, Any] = {}

    def of(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Any:  # noqa: ANN401 - whatever a node may hold
        """The type of a call.

        Raises:
            PassError: the operator rejects the operands' types.
        """
        key = None
        if isinstance(target, OpOverload) and not _FRESH & set(target.tags):
            key = call_key(target, args, kwargs)
        if key is None:
            return infer(self.program, target, args, kwargs)
        if key not in self._known:
            self._known[key] = infer(self.program, target, args, kwargs)
        return self._known[key]
