"""``Statistics``: what one sweep learned, and the ranges every method reads from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from planish.ir.errors import UsageError
from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.range_average import average
from planish.passes.observe.range_entropy import entropy
from planish.passes.observe.range_minmax import minmax
from planish.passes.observe.range_mse import mse
from planish.passes.observe.range_percentile import SHARE, percentile
from planish.passes.observe.range_token import RangeLoss, candidates, token
from planish.passes.observe.sketch import ChannelStats, Sketch

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse", "token"]


class Statistics:
    """Sketches of the values one sweep observed.

    Args:
        sketches: by name of the value.
        channels: by name and axis (not negative).
        ranks: number of axes of each value.
        samples: how many samples the sweep saw.
        remarks: sentences for the report.

    Attributes:
        samples: how many samples the sweep saw.
        remarks: sentences for the report.
    """

    def __init__(
        self,
        sketches: Mapping[str, Sketch],
        channels: Mapping[tuple[str, int], ChannelStats],
        ranks: Mapping[str, int],
        *,
        samples: int,
        remarks: tuple[str, ...] = (),
    ):
        self._sketches = dict(sketches)
        self._channels = dict(channels)
        self._ranks = dict(ranks)
        self._found: dict[tuple[str, str, QuantScheme, float], tuple[float, float]] = {}
        self.samples = samples
        self.remarks = remarks

    def __contains__(self, name: str) -> bool:
        return name in self._sketches

    def __iter__(self) -> Iterator[str]:
        """Names of the values, in the order they were asked for."""
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    def sketch(self, name: str) -> Sketch:
        """All that is known of a value.

        Raises:
            UsageError: it was not observed.
        """
        if name not in self._sketches:
            raise UsageError(
                f"the value {name!r} was not observed", hint="name it in observe(values=...)"
            )
        return self._sketches[name]

    def range(
        self,
        name: str,
        method: RangeMethod,
        scheme: QuantScheme,
        *,
        share: float = SHARE,
        loss: RangeLoss | None = None,
    ) -> tuple[float, float]:
        """The real range to quantize a value with; ``scheme.qparams`` makes a scale of it.

        For a symmetric scheme only that scale counts: either end may be given smaller than what
        the scheme can write there.

        Args:
            name: the value.
            method: "minmax", "average" (of the samples' ranges), "percentile", "entropy" (KL),
                "mse" (least squared error), or "token" (clip at a quantile of tokens' extremes).
            scheme: which integers; per tensor.
            share: for "percentile", of the values that stay within the range.
            loss: for "token", the loss of a clip (low, high), such as that of the network with
                this clip; None takes the squared error of the value itself.

        Raises:
            UsageError: the value was not observed, there is no such method, or the scheme is not
                per tensor.
        """
        sketch = self.sketch(name)
        if method not in get_args(RangeMethod):
            raise UsageError(
                f"there is no range method {method!r}",
                hint="use " + ", ".join(get_args(RangeMethod)),
            )
        if scheme.granularity != "tensor":
            raise UsageError(
                f"one range for {name!r} does not make a scheme {scheme}",
                hint="use a scheme per tensor, or Statistics.channel",
            )
        if method == "token" and loss is not None:
            return token(sketch.histogram, sketch.minima, sketch.maxima, scheme, loss)
        key = (name, method, scheme, share)
        if key not in self._found:
            self._found[key] = _range(sketch, method, scheme, share)
        return self._found[key]

    def candidates(self, name: str) -> tuple[tuple[float, float], ...]:
        """The clips that method "token" chooses from, the widest first."""
        sketch = self.sketch(name)
        return candidates(sketch.minima, sketch.maxima)

    def channel(self, name: str, axis: int = -1) -> ChannelStats:
        """Statistics of each index along an axis.

        Raises:
            UsageError: they were not asked for.
        """
        self.sketch(name)
        found = self._channels.get((name, axis % max(self._ranks[name], 1)))
        if found is None:
            raise UsageError(
                f"statistics per channel of {name!r} along axis {axis} were not collected",
                hint=f"observe(..., per_channel=[({name!r}, {axis})])",
            )
        return found


def _range(
    sketch: Sketch, method: RangeMethod, scheme: QuantScheme, share: float
) -> tuple[float, float]:
    histogram = sketch.histogram
    match method:
        case "minmax":
            return minmax(histogram)
        case "average":
            return average(sketch)
        case "percentile":
            return percentile(histogram, scheme, share)
        case "entropy":
            return entropy(histogram, scheme)
        case "mse":
            return mse(histogram, scheme)
        case "token":
            return token(histogram, sketch.minima, sketch.maxima, scheme)
