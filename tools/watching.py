"""Instruments that only the command line needs."""

from __future__ import annotations

from planish.passes.steps import Instrument, Run, Step
from planish.tools.console import Stages


class PassProgress(Instrument):
    """Moves the progress bar along the passes."""

    def __init__(self, stages: Stages):
        self._stages = stages

    def before_pass(self, step: Step) -> None:
        """Show the pass that begins."""
        self._stages(f"pass: {step.name}", step.index - 1, len(step.run.steps))

    def after_pipeline(self, run: Run) -> None:
        """What follows is bookkeeping."""
        self._stages("finishing")
