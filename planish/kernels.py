"""What the report says of a quantized file: integer kernels, float fallbacks, and the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = 12  # float fallbacks that the terminal lists; the JSON has them all


def kernel_lines(runtime: Mapping[str, Any]) -> list[str]:
    """Sentences on the kernels and on how near the file is; none for a float program.

    Args:
        runtime: the part of the report that an export adds.
    """
    uses = runtime.get("kernels") or []
    lines = []
    if uses:
        counts = Counter(use["kernel"] for use in uses if use["kernel"] is not None)
        listed = ", ".join(f"{count} {kernel}" for kernel, count in counts.most_common())
        kernels = f"{counts.total()} of {len(uses)} quantized operators run integer kernels"
        lines.append(f"{kernels}: {listed}" if listed else kernels)
    steps = runtime.get("stepwise")
    if steps:
        lines.append(
            f"{steps['values']} values of the file agree with the program one by one: integers "
            f"within {steps['max_steps']} steps, real numbers within {steps['max_relative']:.1e} "
            "of their largest"
        )
        if steps["unchecked"]:
            lines.append(f"not comparable one by one: {', '.join(steps['unchecked'])}")
        found = runtime["fidelity"]
        apart = "identical" if found["equal"] else f"SQNR {found['sqnr_db']:.1f} dB"
        lines.append(f"its outputs against the program's, fully optimized: {apart}")
    if runtime.get("instruction_sets"):
        lines.append(f"its answers hold on: {', '.join(runtime['instruction_sets'])}")
    return lines


def fallback_parts(runtime: Mapping[str, Any]) -> list[RenderableType]:
    """A table of the quantized operators that run in float; nothing where there are none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    floats = [use for use in runtime.get("kernels") or [] if use["kernel"] is None]
    if not floats:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("runs in float", "operator", "why"):
        table.add_column(title, overflow="fold")
    for use in floats[:_SHOWN]:
        # As texts: in plain strings rich would read "[0]" as its own markup.
        table.add_row(*(Text(use[key]) for key in ("node", "operator", "reason")))
    parts: list[RenderableType] = [table]
    if len(floats) > _SHOWN:
        more = len(floats) - _SHOWN
        parts.append(Text(f"{more} more run in float; the JSON report has all", style="dim"))
    return parts
