"""What goes wrong quietly: numbers that cancel or overflow, padding, shares that no rank has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import NothingToDoError, RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.factorize.factorize import Factorize
from planish.passes.factorize.factors import Moments, Task, solve
from planish.passes.factorize.importance import output_importance
from planish.passes.factorize.latency import latencies
from planish.passes.factorize.sequence import moments
from planish.passes.factorize.sites import find_sites
from planish.passes.quantize.where import Where
from tests.passes.factorize.test_latency import Clock


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _run(
    options: Factorize, program: Program, batches: list[Any], seed: int = 0
) -> tuple[PassResult, list[str]]:
    said: list[str] = []
    context = PassContext(remark=said.append, generator=_generator(seed))
    with spool(batches, program) as context.calibration:
        return options.run(program.clone(), context), said


def tensors(program: Program) -> dict[str, Tensor]:
    """The constants that are tensors."""
    return {n: v for n, v in program.constants.items() if isinstance(v, Tensor)}


def _first_linear(width: int = 6) -> Any:
    return capture(nn.Linear(width, 4).eval(), (torch.randn(2, width),)).operators[0]


def test_a_large_mean_does_not_drown_the_covariance() -> None:
    x = _random(500, 6) + 3000
    old = x + 0.1 * _random(500, 6, seed=1)
    drift = _random(500, 4, seed=2)

    def pieces(value: Tensor) -> Iterator[Tensor]:
        return iter(value.unsqueeze(0).split(125, 1))

    def drifts() -> Iterator[Tensor]:
        return iter(drift.split(125))

    found = moments(pieces(x), _first_linear(), pieces(old), drifts())
    assert found.cross is not None
    assert found.mean_before is not None
    assert found.drift is not None
    exact, before = x.double(), old.double()
    for have, a, b in (
        (found.second - torch.outer(found.mean, found.mean), exact, exact),
        (found.cross - torch.outer(found.mean_before, found.mean), before, exact),
    ):
        want = (a - a.mean(0)).t() @ (b - b.mean(0)) / 500
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.drift, drift.double().t() @ exact / 500, rtol=1e-5, atol=1e-3)


def test_numbers_of_64_bits_stay_what_they_are() -> None:
    x = _random(40, 6).double()
    found = moments(iter([x.unsqueeze(0)]), _first_linear())
    torch.testing.assert_close(found.second, x.t() @ x / 40, rtol=1e-14, atol=1e-14)
    program = capture(nn.Linear(6, 8).double().eval(), (x[:2],))
    result, _ = _run(Factorize(rank_multiple=1), program, [(x[:2],)] * 2)
    weights = [v for v in result.program.constants.values() if isinstance(v, Tensor)]
    assert {w.dtype for w in weights} == {torch.float64}


def test_what_no_row_says_follows_the_weight() -> None:
    w = _random(6, 8).double()
    constant = torch.ones(5, 8).double()
    made = solve(
        Task(w, Moments(constant.t() @ constant / 5, constant.mean(0), rows=5)), "whitened"
    ).factors(3)
    best = solve(Task(w), "svd").factors(3)
    torch.testing.assert_close(made.second @ made.first, best.second @ best.first)
    x = _random(2, 8, seed=3).double()
    task = Task(w, Moments(x.t() @ x / 2, x.mean(0), rows=2), center=False)
    made = solve(task, "whitened").factors(3)
    product = made.second @ made.first
    torch.testing.assert_close(x @ product.t(), x @ w.t())
    # The third direction is free, and no other choice of it leaves less of the weight.
    seen = torch.linalg.qr(w @ x.t()).Q
    rest = torch.linalg.svdvals(w - seen @ (seen.t() @ w))
    assert float((w - product).norm()) == pytest.approx(float(rest[1:].norm()), rel=1e-6)


def test_small_gradients_neither_vanish_nor_overflow_in_half() -> None:
    w = _random(6, 8).double()
    for size in (1e-14, 1e14):
        made = solve(Task(w, fisher=size * torch.arange(1.0, 7)), "fisher").factors(4)
        exact = made.second @ made.first
        half = made.second.half().double() @ made.first.half().double()
        torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2)


def test_large_outputs_in_half_keep_their_importance() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 300)).half().eval()
    x = (_random(4, 6) * 50).half()
    program = capture(net, (x,))
    context = PassContext()
    with spool([(x,)], program) as context.calibration:
        found = output_importance(program, {program.operators[0]: -1}, context)
    assert float(next(iter(found.values())).trace()) > 0


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(ids)) * attention_mask.unsqueeze(-1)
        return y


def test_padding_is_no_word() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (6, 10))
    mask = torch.ones(6, 10, dtype=torch.long)
    mask[:, 4:] = 0
    options = Factorize(
        embeddings=True,
        padding_mask="attention_mask",
        aim="layer",
        rank_multiple=1,
        keep=0.4,
        where=Where(include=("table",)),
    )
    program = capture(_Words().eval(), (ids, mask))
    tables = []
    for padded in (0, 7):
        words = torch.where(mask == 1, ids, padded)
        result, _ = _run(options, program, [(words, mask)] * 2)
        made = tensors(result.program)
        tables.append(made["table.first.weight"] @ made["table.second.weight"].t())
    torch.testing.assert_close(tables[0], tables[1])


def test_a_share_below_rank_one_is_said() -> None:
    program = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    said: list[str] = []
    context = PassContext(remark=said.append)
    result = Factorize(method="svd", keep=0.1).run(program.clone(), context)
    assert len(result.changes) == 1
    assert said == [
        "1 layers cannot keep as little as 10% of their parameters: at rank 1 weight keeps 58%"
    ]


def test_a_stride_makes_rows_then_columns_slower_below_the_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(8, 8, 3, stride=2, padding=1).eval()
    program = capture(net, (torch.randn(1, 8, 16, 16),))
    (site,), _ = find_sites(program, Where(), spatial=True, embeddings=False)
    assert site.limit == pytest.approx(8)  # of parameters it is 12
    for rank in (7, 9):
        assert (site.macs_at(rank) < site.macs) == (rank < site.limit)
    tight = Factorize(
        method="svd", convolution="spatial", rule="error", error=0.35, rank_multiple=9
    )
    result = tight.run(program.clone(), PassContext())
    assert not result.changes
    assert "from 8 on factors are no faster" in result.refusals[0].reason


def test_layers_of_two_types_are_timed_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x).double())
            return y

    program = capture(Two().eval(), (torch.randn(2, 8),))
    sites, _ = find_sites(program, Where(), spatial=False, embeddings=False)
    clock = Clock()
    latencies(sites, {s.name: [1] for s in sites}, clock)
    assert clock.timed == 4


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.ConvTranspose1d(4, 4, 3), (1, 4, 6), "a transposed convolution"),
        (nn.ConvTranspose2d(4, 4, 3), (1, 4, 6, 6), "a transposed convolution"),
        (nn.LSTM(4, 4), (3, 1, 4), "recurrent"),
    ],
)
def test_what_is_no_product_of_one_weight_is_named(
    module: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    program = capture(module.eval(), (torch.randn(shape),))
    with pytest.raises(NothingToDoError, match=reason):
        Factorize(method="svd").run(program, PassContext())


class _Shared(nn.Module):
    """Two linears of one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x + 2), self.b(x - 5)


def test_a_shared_bias_takes_up_each_mean_apart() -> None:
    torch.manual_seed(0)
    net = _Shared().eval()
    x = (_random(200, 6),)
    program = capture(net, x)
    result, _ = _run(Factorize(rank_multiple=1, keep=0.4), program, [x])
    assert len(result.changes) == 2
    for have, want in zip(run(result.program, x), run(program, x), strict=True):
        torch.testing.assert_close(have.mean(0), want.mean(0), atol=1e-4, rtol=1e-4)


def test_a_module_called_twice_is_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.other(self.same(self.same(x)))
            return y

    program = capture(Twice().eval(), (torch.randn(4, 6),))
    result, _ = _run(Factorize(rank_multiple=1), program, [(torch.randn(4, 6),)])
    assert len(result.changes) == 1
    assert "2 operators read it (shared or tied)" in result.refusals[0].reason
    assert result.refusals[0].rule == "factorize-weight"


def test_the_same_seed_gives_the_same_numbers_and_the_model_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    held = {k: v.clone() for k, v in net.state_dict().items()}
    x = (_random(30, 8),)
    program = capture(net, x)
    one, two, other = (
        _run(Factorize(rank_multiple=1), program, [x], seed)[0].program for seed in (1, 1, 2)
    )
    assert torch.equal(run(one, x)[0], run(two, x)[0])
    assert not torch.equal(run(one, x)[0], run(other, x)[0])
    for name, value in net.state_dict().items():
        assert torch.equal(value, held[name])


def test_no_calibration_is_one_error() -> None:
    program = capture(nn.Linear(6, 6).eval(), (torch.randn(2, 6),))
    with pytest.raises(RequirementError, match="there are none"):
        Factorize().run(program.clone(), PassContext())
    with pytest.raises(UsageError, match="no batch"):
        spool([], program)


def test_padding_that_is_a_word_is_refused_in_space_only() -> None:
    program = capture(nn.Conv2d(4, 6, 3, padding="same").eval(), (torch.randn(1, 4, 8, 8),))
    with pytest.raises(NothingToDoError, match="its padding is a word"):
        find_sites(program, Where(), spatial=True, embeddings=False)
    sites, _ = find_sites(program, Where(), spatial=False, embeddings=False)
    assert [s.form for s in sites] == ["pair"]


@pytest.mark.parametrize("window", [(1, 5), (5, 1)])
def test_windows_of_one_row_become_a_pair_also_in_space(window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    program = capture(nn.Conv2d(4, 6, window).eval(), (torch.randn(1, 4, 8, 8),))
    (site,), _ = find_sites(program, Where(), spatial=True, embeddings=False)
    assert site.form == "pair"
    assert site.macs_at(1) * site.rows.numel() == site.macs * sum(site.rows.shape)


def test_half_weights_stay_half() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(torch.bfloat16).eval()
    x = (_random(64, 16).to(torch.bfloat16),)
    program = capture(net, x)
    result, _ = _run(Factorize(rank_multiple=1, keep=0.9), program, [x])
    assert {v.dtype for v in result.program.constants.values()} == {torch.bfloat16}
    have, want = run(result.program, x)[0].float(), run(program, x)[0].float()
    assert float((have - want).norm() / want.norm()) < 0.3


@pytest.mark.parametrize(
    ("module", "shape", "rank"),
    [
        (nn.Linear(768, 768), (1, 768), 384),
        (nn.Linear(768, 3072), (1, 768), 768 * 3072 / (768 + 3072)),
        (nn.Conv2d(8, 16, 3, stride=2), (1, 8, 9, 9), 8 * 16 * 9 / (8 * 9 + 16)),
        (nn.Conv2d(8, 16, 1), (1, 8, 4, 4), 8 * 16 / (8 + 16)),
        (nn.Embedding(50, 8), None, 50 * 8 / (50 + 8)),
    ],
)
def test_break_even_of_layers_is_as_published(
    module: nn.Module, shape: tuple[int, ...] | None, rank: float
) -> None:
    x = torch.randn(shape) if shape else torch.randint(0, 50, (2, 3))
    program = capture(module.eval(), (x,))
    (site,), _ = find_sites(program, Where(), spatial=False, embeddings=True)
    assert site.break_even == pytest.approx(rank)
    assert site.parameters_at(3) == 3 * sum(site.rows.shape)
    if shape:  # a table's are no multiplications
        assert site.macs_at(3) * site.parameters == site.macs * site.parameters_at(3)


def test_break_even_of_rows_then_columns_is_as_published() -> None:
    program = capture(nn.Conv2d(8, 16, 3, padding=1).eval(), (torch.randn(1, 8, 6, 6),))
    (site,), _ = find_sites(program, Where(), spatial=True, embeddings=False)
    assert site.break_even == site.limit == pytest.approx(8 * 16 * 3 / (8 + 16))


class TestRowsThenColumns:
    """``convolution=spatial`` by what the convolutions read."""

    @staticmethod
    def _smooth(count: int) -> list[tuple[Tensor]]:
        """Images whose rows are alike, as those of real pictures are."""
        made = torch.randn(count, 4, 4, 24, 12, generator=_generator(5)).cumsum(3)
        return [(x - x.mean((2, 3), keepdim=True),) for x in made]

    def _error(self, **options: Any) -> float:
        torch.manual_seed(0)
        net = nn.Conv2d(4, 8, 3, padding=1).eval()
        batches = self._smooth(6)
        program = capture(net, batches[0])
        result, _ = _run(
            Factorize(convolution="spatial", rank_multiple=1, keep=0.4, **options),
            program,
            batches[:4],
        )
        assert len(result.changes) == 1
        held = batches[4]
        return float((run(result.program, held)[0] - run(program, held)[0]).norm())

    @pytest.mark.parametrize("aim", ["layer", "outputs"])
    def test_inputs_help(self, aim: str) -> None:
        assert self._error(aim=aim) < 0.7 * self._error(method="svd")

    def test_moments_are_those_of_what_the_first_one_reads(self) -> None:
        net = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(2, 1)).eval()
        x = (_random(2, 3, 9, 7),)
        program = capture(net, x)
        result, _ = _run(
            Factorize(convolution="spatial", rank_multiple=1, keep=0.9, aim="layer"), program, [x]
        )
        first = result.program.operators[0]
        read = nn.functional.unfold(x[0], (3, 1), (2, 1), (1, 0), (2, 1)).movedim(1, 2)
        rows = read.flatten(0, 1).double()
        (site,), _ = find_sites(program, Where(), spatial=True, embeddings=False)
        basis = solve(
            Task(site.rows, Moments(rows.t() @ rows / len(rows), rows.mean(0)), center=False),
            "whitened",
        )
        rank = int(first.meta["val"].shape[1])
        made = basis.factors(rank)
        found = tensors(result.program)
        stem = found["weight.first.weight"].flatten(1), found["weight.second.weight"]
        second = stem[1].squeeze(2).permute(0, 2, 1).flatten(0, 1)
        torch.testing.assert_close(
            second @ stem[0], (made.second @ made.first).float(), rtol=1e-3, atol=1e-4
        )
