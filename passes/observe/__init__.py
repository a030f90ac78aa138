"""Statistics of a program's values over calibration inputs: ranges and channels."""

if __name__ != "planish.passes.observe":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.observe', not as {__name__!r}")

from planish.passes.observe.sketch import ChannelStats, Sketch
from planish.passes.observe.statistics import RangeMethod, Statistics
from planish.passes.observe.sweep import observe

__all__ = ["ChannelStats", "RangeMethod", "Sketch", "Statistics", "observe"]
