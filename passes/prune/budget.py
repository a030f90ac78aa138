"""Which units go, all groups ranked together, so that the work comes down to a share.

Units go by rising score until the multiply-accumulates are few enough; the best unit of each group
stays. What is left of an operator's work is taken to be the product of what is left of the groups
along the axes of its constants, which is exact for linears and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from planish.ir.cost import cost, macs_of
from planish.ir.program import Program
from planish.passes.prune.groups import Group


def work_left(program: Program, groups: Sequence[Group]) -> Callable[[Mapping[Group, int]], float]:
    """A function from how many units each group keeps to multiply-accumulates of the program."""
    factors: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        for place in group.constants:
            value = program.constant(place.node)
            if value is None or value.dim() < 2:
                continue  # a bias is cut along with a matrix, whose work it does not change
            for user in place.node.users:
                if macs := macs_of(program, user):
                    factors.setdefault((user.name, macs), []).append(group)
    fixed = cost(program).macs - sum(macs for _, macs in factors)

    def left(kept: Mapping[Group, int]) -> float:
        total = Fraction(fixed)
        for (_, macs), along in factors.items():
            share = Fraction(macs)
            for group in along:
                share *= Fraction(kept[group], group.size)
            total += share
        return float(total)

    return left


def under_budget(
    program: Program, scores: Mapping[Group, Tensor], target: float
) -> tuple[dict[Group, int], float]:
    """How many units each group keeps, and what work that leaves.

    Args:
        program: holds the groups.
        scores: ``[units]`` of each group, on one scale.
        target: multiply-accumulates to come down to; where that cannot be reached, each group
            keeps one unit.
    """
    groups = list(scores)
    left = work_left(program, groups)
    removable = sorted(
        (value, place)
        for place, group in enumerate(groups)
        for value in scores[group].sort().values[:-1].tolist()
    )

    def after(count: int) -> dict[Group, int]:
        kept = {group: group.size for group in groups}
        for _, place in removable[:count]:
            kept[groups[place]] -= 1
        return kept

    low, high = 0, len(removable)
    while low < high:  # the fewest that reach the target
        middle = (low + high) // 2
        if left(after(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    kept = after(low)
    return kept, left(kept)
