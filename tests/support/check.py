"""What every pass is held to: ``check`` where it fires, ``refuses`` where it declines.

``check`` captures a module, runs one pass through the verifier, compares numbers on the sample and
on the second probe, compares the canonical text, and asserts what DESIGN asks of every pass:
the number of changes, idempotence, provenance, and a caller's module left as it was.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.compare import bounds_of, difference
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.probe import second_reference
from planish.ir.program import Program
from planish.ir.snapshot import Snapshot
from planish.ir.text import text
from planish.ir.verify import verify
from planish.passes.base import Contract, Pass, PassContext, PassResult


def check(
    module: nn.Module | Program,
    args: tuple[Any, ...],
    pass_: Pass,
    after: str | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    changes: int | None = None,
    context: PassContext | None = None,
) -> PassResult:
    """Assert that a pass fires, and that all its promises hold.

    Args:
        module: put into evaluation mode, captured, and otherwise left alone. A program is copied.
        args: the sample inputs; not read where ``module`` is a program.
        pass_: what to run.
        after: the canonical text it must give, indented as you like; None skips this.
        kwargs: keyword sample inputs.
        dynamic_shapes: as ``torch.export`` takes it.
        changes: how many changes it must make; None asks for at least one.
        context: for passes that need more than the program.
    """
    saved = _state(module)
    before = _captured(module, args, kwargs, dynamic_shapes)
    result = run_checked(before, pass_, context)
    if after is not None:
        _assert_text(result.program, after)
    made = len(result.changes)
    if changes is None:
        assert made, f"{pass_.name} changed nothing:\n{text(before)}\n{result.refusals}"
    else:
        assert made == changes, f"{made} changes, not {changes}: {result.changes}"
    again = run_checked(result.program, pass_, context)
    assert not again.changes, f"a second run still changes: {again.changes}"
    assert text(again.program) == text(result.program)
    _assert_untouched(module, saved)
    return result


def refuses(
    module: nn.Module | Program,
    args: tuple[Any, ...],
    pass_: Pass,
    because: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    changes: int = 0,
    context: PassContext | None = None,
) -> PassResult:
    """Assert that a pass declines somewhere, with a reason that contains ``because``.

    Without changes, the program must also read as before.
    """
    saved = _state(module)
    before = _captured(module, args, kwargs, dynamic_shapes)
    result = run_checked(before, pass_, context)
    reasons = [r.reason for r in result.refusals]
    assert any(because in reason for reason in reasons), f"{because!r} is not among {reasons}"
    assert len(result.changes) == changes, result.changes
    if changes == 0:
        assert text(result.program, values=True) == text(before, values=True)
    _assert_untouched(module, saved)
    return result


def unchanged(
    module: nn.Module | Program,
    args: tuple[Any, ...],
    pass_: Pass,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    context: PassContext | None = None,
) -> PassResult:
    """Assert that a pass leaves a program alone, with or without reasons."""
    before = _captured(module, args, kwargs, dynamic_shapes)
    result = run_checked(before, pass_, context)
    assert not result.changes, result.changes
    assert text(result.program, values=True) == text(before, values=True)
    return result


def run_checked(before: Program, pass_: Pass, context: PassContext | None = None) -> PassResult:
    """Run a pass on a copy of a program, and hold the result against the original."""
    verify(before)
    shown = text(before)
    snapshot = Snapshot(before, values=True)
    result = pass_.run(before.clone(), context or PassContext())
    verify(result.program, since=before, snapshot=snapshot)
    verify(result.program)
    assert text(before) == shown, "the pass edited the program it was given a copy of"
    _assert_provenance(before, result.program)
    if pass_.contract is Contract.EXACT:
        assert_equal(before, result.program)
    return result


def assert_equal(before: Program, after: Program) -> None:
    """Assert that two programs agree on the samples and on the second probe."""
    bounds, names = bounds_of(before), before.signature.output_names
    probes = [(sample, run(before, sample)) for sample in before.samples]
    second = second_reference(before)
    assert not second.rejected, f"the module itself is at fault: {second.rejected}"
    if second.inputs is not None:
        probes.append((second.inputs, second.outputs))
    for inputs, reference in probes:
        try:
            found = difference(reference, run(after, inputs), names=names, bounds=bounds)
        except PassError as error:
            found = str(error)
        sizes = [list(v.shape) if isinstance(v, Tensor) else v for v in inputs]
        assert found is None, f"at inputs {sizes}: {found}\n{text(before)}\n{text(after)}"


def _captured(
    module: nn.Module | Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> Program:
    if isinstance(module, Program):
        return module.clone()
    return capture(module.eval(), args, kwargs, dynamic_shapes=dynamic_shapes)


def _assert_text(program: Program, after: str) -> None:
    expected = textwrap.dedent(after).strip().splitlines()
    got = text(program).strip().splitlines()
    if got != expected:
        lines = difflib.unified_diff(expected, got, "expected", "got", n=2, lineterm="")
        shown = textwrap.indent("\n".join(got), "        ")
        raise AssertionError("\n".join(lines) + "\n\nall of it:\n" + shown)


def _assert_provenance(before: Program, after: Program) -> None:
    known = {n.name: n.target for n in before.nodes}
    for node in after.operators:
        if known.get(node.name) != node.target:
            assert "from" in node.meta, f"{node.name} = {node.target} does not say where it is from"


def _state(module: nn.Module | Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Every tensor of a module: the object, and a copy of its value."""
    if isinstance(module, Program):
        constants = module.constants.items()
        return {k: (v, v.clone()) for k, v in constants if isinstance(v, Tensor)}
    return {name: (t, t.detach().clone()) for name, t in _tensors(module).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def _assert_untouched(module: nn.Module | Program, saved: dict[str, tuple[Tensor, Tensor]]) -> None:
    now = _state(module)
    assert now.keys() == saved.keys(), "the caller's module gained or lost a tensor"
    for name, (tensor, value) in saved.items():
        assert now[name][0] is tensor, f"{name} of the caller's module is another object"
        same = torch.equal(tensor.detach().nan_to_num(), value.nan_to_num())
        assert same, f"{name} of the caller's module changed"
