"""Measure small programs on a target, for passes that choose by speed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planish.backends.base import ExportOptions
from planish.backends.registry import load_backend, load_target
from planish.ir.program import Program

# Each program runs at least this often, and all of them together about this long.
_ROUNDS = 7
_SECONDS = 2.0
_WARM_UP = 2


class TargetTimer:
    """Times programs as the files of a target, in its runtime on one thread.

    Args:
        target: name of the target.
    """

    def __init__(self, target: str):
        load_target(target)  # an unknown name is an error now, and not when something is timed
        self.target = target

    def seconds(self, programs: Sequence[tuple[Program, Sequence[Any]]]) -> list[float]:
        """Seconds of the fastest run of each, all run in turns.

        Args:
            programs: each with its flat inputs.

        Raises:
            PlanishError: a program has no form in this target, or the runtime refuses it.
        """
        backend = load_backend(self.target)
        options = ExportOptions(verify=False)
        with tempfile.TemporaryDirectory(prefix="planish-") as folder:
            runs = []
            for number, (program, inputs) in enumerate(programs):
                path = Path(folder) / f"{number}{backend.target.suffix}"
                backend.export(program, path, options)
                runs.append((backend.opened(path), inputs))
            for run, inputs in runs * _WARM_UP:
                run(inputs)
            best = [float("inf")] * len(runs)
            end, rounds = time.perf_counter() + _SECONDS, 0
            while rounds < _ROUNDS or (time.perf_counter() < end and rounds < 50 * _ROUNDS):
                for number, (run, inputs) in enumerate(runs):
                    start = time.perf_counter()
                    run(inputs)
                    best[number] = min(best[number], time.perf_counter() - start)
                rounds += 1
        return best
