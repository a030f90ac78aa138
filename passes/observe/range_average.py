"""Range "average": the mean of the samples' ranges, so that one outlier does not decide.

Common observers average over batches with a decay, which makes the range depend on the batch size
and on the order. The mean over samples is the moving average with weight 1/n: it depends on
neither.
"""

from __future__ import annotations

from planish.passes.observe.sketch import Sketch


def average(sketch: Sketch) -> tuple[float, float]:
    """Mean smallest and mean largest value of a sample; ``sketch`` must not be empty."""
    return sketch.mean_low, sketch.mean_high
