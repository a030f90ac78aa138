"""What a program computed at its nodes, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.program import Program

_LIMIT_BYTES = 1 << 29


class Recorded:
    """Values of a program's operators on its samples, by name.

    If all of them together fit into ``limit_bytes``, the program runs once per sample; if not, it
    runs again for each question and keeps only what was asked for. Tensors are copied into
    row-major order, so that none keeps a larger one in memory.

    Args:
        program: what to run; it is not edited.
        limit_bytes: how much memory all values may take.
        seed: of the random numbers, where the program draws some.
    """

    def __init__(self, program: Program, *, limit_bytes: int = _LIMIT_BYTES, seed: int = 0):
        self.program = program
        self.limit_bytes = limit_bytes
        self.seed = seed
        self._all: dict[str, tuple[Any, ...]] | None = None
        self._too_many = False

    def of(self, names: Iterable[str]) -> Mapping[str, tuple[Any, ...]]:
        """The values of these operators, one per sample.

        Raises:
            PassError: the program fails on a sample, before one of them.
        """
        wanted = set(names)
        if not wanted or not self.program.samples:
            return dict.fromkeys(wanted, ())
        if self._all is None and not self._too_many:
            self._all = self._run(None)
            self._too_many = self._all is None
        found = self._all if self._all is not None else self._run(wanted)
        assert found is not None
        missing = sorted(wanted - found.keys())
        if missing:
            raise PassError(f"the program fails before it has computed {missing[0]}")
        return {name: found[name] for name in wanted}

    def _run(self, wanted: set[str] | None) -> dict[str, tuple[Any, ...]] | None:
        """Values of the wanted nodes; of all nodes, or None where those are too large."""
        found: dict[str, list[Any]] = {}
        held = 0

        def keep(node: Node, value: Any) -> None:  # noqa: ANN401 - whatever an operator gives
            nonlocal held
            if wanted is not None and node.name not in wanted:
                return
            if isinstance(value, Tensor):
                held += value.numel() * value.element_size()
                if wanted is None and held > self.limit_bytes:
                    raise _TooLargeError
                value = value.detach().clone(memory_format=torch.contiguous_format)
            found.setdefault(node.name, []).append(value)

        try:
            for sample in self.program.samples:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    run(self.program, sample, observe=keep)
        except _TooLargeError:
            return None
        except PassError:
            pass  # what came before the operator that failed is known all the same
        samples = len(self.program.samples)
        return {name: tuple(v) for name, v in found.items() if len(v) == samples}


class _TooLargeError(Exception):
    """The values take more memory than they may; the run ends here."""
