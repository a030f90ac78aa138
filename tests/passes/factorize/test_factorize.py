"""The pass: what it needs, what it says, and that it composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish
from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.errors import NothingToDoError, PlanishError, RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.factorize.factorize import Factorize
from planish.passes.factorize.importance import output_importance
from planish.passes.quantize.where import Where
from tests.support.check import check


class Block(nn.Module):
    """An encoder's feed-forward half, with a residual and a norm."""

    def __init__(self, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x + self.down(F.gelu(self.up(x)))))
        return y


def _block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def _batches(count: int, seed: int = 0) -> list[tuple[Tensor]]:
    """Tokens that lie near a subspace, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    mixture = mixture @ torch.diag(torch.logspace(0, -2, 24))
    return [(torch.randn(8, 10, 24, generator=generator) @ mixture.t(),) for _ in range(count)]


def _open(module: nn.Module, sample: Tensor) -> Program:
    """With a first axis of any size."""
    batch = torch.export.Dim("batch", max=4096)
    return capture(module.eval(), (sample,), dynamic_shapes=({0: batch},))


FFN = Where(include=("up", "down"))


def _run(options: Factorize, program: Program | None = None, **more: Any) -> Program:
    program = program or capture(_block(), _batches(1)[0])
    context = PassContext(**more)
    with spool(_batches(12), program) as context.calibration:
        return options.run(program.clone(), context).program


def _noise(program: Program) -> float:
    """Energy of the error at the outputs on held data."""
    before = capture(_block(), _batches(1)[0])
    total = 0.0
    for batch in _batches(4, seed=77):
        reference, found = run(before, batch)[0], run(program, batch)[0]
        total += float((reference - found).square().sum() / reference.square().sum())
    return total


def test_it_keeps_the_promises_of_a_pass() -> None:
    check(_block(), _batches(1)[0], Factorize(method="svd", rank_multiple=4, where=FFN), changes=2)


def test_a_plain_fraction_is_obeyed() -> None:
    before = capture(_block(), _batches(1)[0])
    after = _run(Factorize(keep=0.5, rank_multiple=4, bias=False, where=FFN))
    touched = 2 * 24 * 48
    assert cost(after).parameters <= cost(before).parameters - touched / 2
    assert cost(after).macs < cost(before).macs


def test_better_knowledge_gives_less_error() -> None:
    plain = _noise(_run(Factorize(method="svd", rank_multiple=1, where=FFN)))
    layer = _noise(
        _run(Factorize(aim="layer", sequential=False, bias=False, rank_multiple=1, where=FFN))
    )
    best = _noise(_run(Factorize(rank_multiple=1, where=FFN)))
    assert best < layer < plain
    assert layer < 0.5 * plain


def test_a_budget_of_all_layers_is_kept() -> None:
    before = capture(_block(), _batches(1)[0])
    for rule in ("parameters", "macs"):
        after = _run(Factorize(rule=rule, keep=0.6, bias=False, rank_multiple=1, where=FFN))
        figure = "parameters" if rule == "parameters" else "macs"
        saved = getattr(cost(before), figure) - getattr(cost(after), figure)
        touched = 2 * 24 * 48 * (1 if rule == "parameters" else 80)
        assert saved >= 0.4 * touched


def test_error_and_energy_are_bounds_of_every_layer() -> None:
    program = capture(_block(), _batches(1)[0])
    for options in (
        Factorize(rule="error", error=0.2, aim="layer", rank_multiple=1, where=FFN),
        Factorize(rule="energy", energy=0.96, aim="layer", rank_multiple=1, where=FFN),
    ):
        context = PassContext()
        with spool(_batches(12), program) as context.calibration:
            result = options.run(program.clone(), context)
        said = [c.detail.rsplit(" ", 1)[1] for c in result.changes]
        assert said
        assert all(float(error) <= 0.21 for error in said)


def test_a_layer_that_needs_its_rank_stays_dense() -> None:
    program = _open(nn.Linear(16, 16), torch.randn(4, 16))
    context = PassContext()
    with spool([(torch.randn(64, 16),)], program) as context.calibration:
        result = Factorize(rule="error", error=0.01, rank_multiple=1).run(program.clone(), context)
    assert not result.changes
    assert "stays dense: rank" in result.refusals[0].reason
    assert "from 8 on factors are no smaller" in result.refusals[0].reason


def test_fisher_asks_for_labels_and_weighs_outputs() -> None:
    program = capture(_block(), _batches(1)[0])
    with pytest.raises(RequirementError):
        Factorize(method="fisher").run(program.clone(), PassContext())
    labeled = [(x, torch.arange(80) % 5) for (x,) in _batches(3)]
    options = Factorize(method="fisher", rank_multiple=1, where=FFN)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[1])

    result = options.run(program.clone(), PassContext(labeled=labeled, loss=loss))
    assert len(result.changes) == 2

    def broken(outputs: Tensor, batch: Any) -> Tensor:
        return loss(outputs, batch) * float("nan")

    with pytest.raises(UsageError, match="labeled batch 0"):
        options.run(program.clone(), PassContext(labeled=labeled, loss=broken))


def test_few_rows_are_said() -> None:
    program = _open(_block(), _batches(1)[0][0])
    remarks: list[str] = []
    context = PassContext(remark=remarks.append)
    with spool([(torch.randn(2, 10, 24),)], program) as context.calibration:
        result = Factorize(where=FFN, rank_multiple=1).run(program.clone(), context)
    assert len(result.changes) == 2
    assert "2 layers saw fewer rows than they have inputs (up.weight: 20 for 24)" in remarks[0]


def test_dead_and_infinite_inputs() -> None:
    program = _open(nn.Linear(8, 12), torch.randn(4, 8))
    context = PassContext()
    with spool([(torch.zeros(20, 8),)], program) as context.calibration:
        after = Factorize(rank_multiple=1).run(program.clone(), context).program
    zeros = (torch.zeros(3, 8),)
    torch.testing.assert_close(run(after, zeros), run(program, zeros))
    with (
        spool([(torch.full((20, 8), 1e38),)], program) as context.calibration,
        pytest.raises(PlanishError, match="finite"),
    ):
        Factorize(rank_multiple=1).run(program.clone(), context)


def test_importance_is_that_of_the_jacobian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4, bias=False)).eval()
    program = _open(net, torch.randn(3, 6))
    first = program.operators[0]
    context = PassContext()
    with spool([(torch.randn(2000, 6),)], program) as context.calibration:
        found = output_importance(program, {first: -1}, context)[first]
    weight = net.get_parameter("1.weight").detach().double()
    expected = weight.t() @ weight
    torch.testing.assert_close(
        found / found.trace(), expected / expected.trace(), atol=0.02, rtol=0.05
    )


def test_a_convolution_becomes_a_pair() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    images = [(torch.randn(4, 8, 10, 10),) for _ in range(3)]
    program = capture(net, images[0])
    context = PassContext()
    with spool(images, program) as context.calibration:
        result = Factorize(rank_multiple=1).run(program.clone(), context)
    assert len(result.changes) == 2
    assert cost(result.program).macs < 0.55 * cost(program).macs


def test_a_table_gets_smaller_and_frequent_words_keep_more() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 3)).eval()
    ids = [(torch.randint(0, 5, (4, 6)),) for _ in range(4)]
    program = capture(net, ids[0])
    context = PassContext()
    options = Factorize(
        embeddings=True, keep=0.4, rank_multiple=1, where=Where(include=("*embedding*",))
    )
    with spool(ids, program) as context.calibration:
        after = options.run(program.clone(), context).program
    assert cost(after).bytes < cost(program).bytes

    def error(words: Tensor) -> float:
        return float((run(after, (words,))[0] - run(program, (words,))[0]).square().mean())

    assert error(torch.arange(5).repeat(4, 2)[:, :6]) < 0.5 * error(torch.arange(5, 29).view(4, 6))


def test_options_are_checked() -> None:
    for wrong in (
        {"keep": 0.0},
        {"keep": 1.0},
        {"error": 2.0},
        {"rank_multiple": 0},
        {"least": 1.5},
        {"damping": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Factorize(**wrong)


def test_nothing_to_factor_is_an_error() -> None:
    program = capture(nn.ReLU().eval(), (torch.randn(3),))
    with pytest.raises(NothingToDoError, match="found no weight"):
        Factorize(method="svd").run(program, PassContext())


def test_it_composes_with_int8_and_the_file_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block(64, 256).eval()
    batches = [torch.randn(4, 16, 64) for _ in range(8)]
    sizes = {}
    for name, recipe in (
        ("float", "exact"),
        ("factored", "exact,factorize{keep=0.4}"),
        ("both", "exact,factorize{keep=0.4},quantize{mode=dynamic}"),
    ):
        result = planish.optimize(model, batches[0], recipe=recipe, calibration=batches)
        path = tmp_path / f"{name}.onnx"
        result.export(path)
        sizes[name] = path.stat().st_size
    assert sizes["both"] < 0.6 * sizes["factored"] < 0.6 * sizes["float"]
