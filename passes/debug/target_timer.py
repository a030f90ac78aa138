"""The timer of a run that happens again, which measures where the run itself did."""

from __future__ import annotations

from planish.passes.base import Timer


def target_timer(target: str) -> Timer:
    """Measures small programs on a target, as the run of a user does.

    Args:
        target: its name.

    Raises:
        UsageError: there is no such target.
    """
    # Targets live in a layer above this one, which is looked up only here.
    import importlib

    timer: Timer = importlib.import_module("planish.backends.timer").TargetTimer(target)
    return timer
