"""What checking costs, in facts: how often programs run, and what is alive meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

import planish
from planish.ir import Program, capture, lockstep
from planish.ir.compare import measure, worst
from planish.ir.execute import evaluate
from planish.ir.execute import run as execute
from planish.passes import checking
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.instruments import CompareEach, default_instruments
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.verify_cost import peaks
from tests.support.example_passes import Everything, RoundWeights, SwapActivation

DEPTH, WIDTH = 12, 32


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    shapes = ({0: Dim("batch", max=1024)},)
    return capture(nn.Sequential(*layers).eval(), (torch.randn(64, WIDTH),), dynamic_shapes=shapes)


class Runs:
    """How often each program ran alone, and each operator of the programs side by side."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.alone: list[Program] = []
        self.together: Counter[Node] = Counter()
        patch.setattr(checking, "run", self._run)
        patch.setattr(lockstep, "evaluate", self._evaluate)

    def _run(self, program: Program, inputs: Any, observe: Any = None) -> Any:
        self.alone.append(program)
        return execute(program, inputs, observe=observe)

    def _evaluate(self, node: Node, env: Mapping[Node, Any]) -> Any:
        self.together[node] += 1
        return evaluate(node, env)


def run(program: Program, *passes: Any, **context: Any) -> Run:
    return run_pipeline(program, Recipe(passes), PassContext(**context), [CompareEach(batches=2)])


def test_an_exact_pass_costs_one_run_per_probe_and_nothing_where_it_changed_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    found = run(program, Everything(), SwapActivation(), Everything(count=2))
    assert [runs.alone.count(p) for p in (program, found.program)] == [1, 2]
    assert len(runs.alone) == 3  # the second probe brings the original's answer along
    assert not runs.together


def test_a_lossy_pass_costs_one_run_of_each_program_per_batch(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    batches = [(torch.randn(n, WIDTH),) for n in (3, 5, 7)]
    with spool(batches, program) as held:
        first, second = RoundWeights(), RoundWeights(step=1 / 8)
        found = run(program, SwapActivation(), first, second, calibration=held)
    # Alone: the original on the sample; the second probe, once for every changed program, and the
    # sample for the exact one. Side by side: the sample and two batches, no program twice.
    assert len(runs.alone) == 1 + 2 + 1 + 1
    assert set(runs.together.values()) <= {3, 6}
    # The result once per batch; the one between for both lossy passes; so the original too.
    sets = [{runs.together[n] for n in p.operators} for p in (program, found.program)]
    assert sets == [{6}, {3}]
    assert sum(runs.together.values()) == 3 * 2 * 3 * len(program.operators)


def test_where_nothing_came_before_the_original_runs_once_per_batch(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    run(program, RoundWeights())
    assert sum(runs.together.values()) == 2 * len(program.operators)


def test_what_the_sweep_measures_at_the_outputs_is_what_running_apart_gives(
    program: Program,
) -> None:
    batches = [(torch.randn(3, WIDTH),), (10 * torch.randn(5, WIDTH),)]
    with spool(batches, program) as held:
        found = run(program, SwapActivation(), RoundWeights(), calibration=held)
    record = found.records[1]
    each = [
        measure(execute(program, i), execute(found.program, i))
        for i in (program.samples[0], *batches)
    ]
    assert record.cumulative == worst(each)
    assert len(record.node_errors) == len(record.changes) == 2 * DEPTH
    for change, error in zip(record.changes, record.node_errors, strict=False):
        assert change.error is not None
        assert set(change.error) == {"sqnr_db", "rel_l2"}
        assert error.cumulative is not None
    assert all(c.error is None for c in found.records[0].changes)


def test_optimize_runs_nothing_again_for_its_report(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[Program] = []

    def counted(p: Program, inputs: Any) -> Any:
        again.append(p)
        return execute(p, inputs)

    monkeypatch.setattr("planish.running.run", counted)
    found = planish.optimize(program, recipe=[SwapActivation()])
    assert again == []
    assert found.report.fidelity == measure(
        execute(program, program.samples[0]), execute(found.program, program.samples[0])
    )
    ended = planish.optimize(program, recipe=[SwapActivation()], verify="end")
    assert again == []
    assert ended.report.fidelity == found.report.fidelity
    planish.optimize(program, recipe=[Everything()])
    assert len(again) == 1
    planish.optimize(program, recipe=[SwapActivation()], verify="off")
    assert len(again) == 3


def test_verification_adds_at_most_the_activations_of_one_run(program: Program) -> None:
    class Wide(nn.Module):
        """Two branches that are alive at once, as activations of real models are."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(nn.Linear(64, 256) for _ in range(4))
            self.outer = nn.ModuleList(nn.Linear(256, 64) for _ in range(4))
            self.norm = nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            for up, down in zip(self.inner, self.outer, strict=True):
                x = self.norm(x + down(torch.relu(up(x)) * 1.0) * 1.0)
            return x.mean(1)

    torch.manual_seed(0)
    wide = capture(
        Wide().eval(), (torch.randn(8, 128, 64),), dynamic_shapes=({0: Dim("batch", max=64)},)
    )
    one, off, each = peaks(wide)
    assert one > 0
    assert each - off <= one
    assert each > off / 2


def test_the_answers_of_a_run_are_kept_and_its_probes_are_not(program: Program) -> None:
    instruments = default_instruments()
    (compare,) = [i for i in instruments if isinstance(i, CompareEach)]
    found = run_pipeline(program, Recipe((SwapActivation(),)), PassContext(), instruments)
    assert compare.answers is not None
    reference, outputs = compare.answers
    assert torch.equal(reference[0], execute(program, program.samples[0])[0])
    assert torch.equal(outputs[0], execute(found.program, program.samples[0])[0])
    run_pipeline(program, Recipe((Everything(),)), PassContext(), instruments)
    assert compare.answers is None
