"""Run a program eagerly, node by node: the numeric oracle of every comparison.

Each value is freed after its last use, so the peak is that of the model itself, and no Python
code is generated, so a freshly rewritten graph costs nothing to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.errors import PassError, PlanishError
from planish.ir.infer import reason
from planish.ir.program import Program

Observer = Callable[[Node, Any], None]


def last_uses(program: Program) -> dict[Node, list[Node]]:
    """For each node, the values that nobody reads after it."""
    seen: set[Node] = set()
    frees: dict[Node, list[Node]] = {}
    for node in reversed(program.graph.nodes):
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        frees[node] = fresh
    return frees


def run(
    program: Program, inputs: Sequence[Any], *, observe: Observer | None = None
) -> tuple[Any, ...]:
    """Run on flat inputs and return flat outputs.

    Args:
        program: what to run.
        inputs: one value per placeholder.
        observe: called with every operator node and its value, before the value is freed.

    Raises:
        PassError: an operator failed; the message names the node and the user's source line.
    """
    placeholders = program.placeholders
    if len(inputs) != len(placeholders):
        raise PassError(f"the program takes {len(placeholders)} inputs, got {len(inputs)}")
    env: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    frees = last_uses(program)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                env[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                env[node] = evaluate(node, env)
                if observe is not None:
                    observe(node, env[node])
                if not node.users:
                    del env[node]
            elif node.op == "output":
                result = map_arg(node.args[0], lambda n: env[n])
                return tuple(result)
            for dead in frees[node]:
                env.pop(dead, None)
    raise AssertionError("a graph always ends in its output node")


def evaluate(node: Node, env: Mapping[Node, Any]) -> Any:  # noqa: ANN401 - as the operator gives
    """The value of one operator node.

    Args:
        node: which.
        env: the values of all nodes it reads.

    Raises:
        PassError: the operator failed; the message names the node and the user's source line.
    """
    args = map_arg(node.args, lambda n: env[n])
    kwargs = map_arg(node.kwargs, lambda n: env[n])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except PlanishError:
        raise
    except Exception as error:  # any operator may fail in its own way; all are reported alike
        raise PassError(f"operator failed: {reason(error)}", where=node) from error
