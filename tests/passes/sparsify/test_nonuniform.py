"""Ratios of layers by measured sensitivity: what is measured, chosen, refused and reported."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import MisusedPassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import Fact, PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.quantize.outputs import noise
from planish.passes.quantize.where import Where
from planish.passes.sparsify.alone import Alone, Way, measure_alone
from planish.passes.sparsify.methods import LAYER_METHODS, Score
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import find_sites
from planish.passes.sparsify.sparsify import Sparsify
from tests.passes.rounding.nets import calibrated, small_lm, tensor
from tests.support.check import run_checked


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Branches(nn.Module):
    """Layers of one size beside each other; the gains say how much each of them counts."""

    def __init__(self, *gains: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in gains)
        self.gains = gains

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            total = total + gain * layer(x)
        return total.tanh(), x + 1


class Net(nn.Module):
    """A convolution of two groups, one of 3 x 3 taps, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.apart = nn.Conv2d(8, 16, 1, groups=2)
        self.taps = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.taps(self.apart(x).relu()).relu().mean((2, 3)))
        return y


def branches(*gains: float) -> tuple[Program, PassContext]:
    x = [drawn(24, 32, seed=s) for s in range(3)]
    program = capture(Branches(*gains).eval(), (x[0],))
    return program, PassContext(calibration=spool(x, program))


def net() -> tuple[Program, PassContext]:
    x = [drawn(4, 8, 6, 6, seed=s) for s in range(3)]
    program = capture(Net().eval(), (x[0],))
    return program, PassContext(calibration=spool(x, program))


def shares(result: PassResult) -> dict[str, float]:
    """How much of each sparse weight is zero."""
    program = result.program
    return {n: float((tensor(program, n) == 0).float().mean()) for n in program.layouts}


def error(program: Program, changed: Program, *inputs: Tensor) -> float:
    return noise(run(program, inputs), run(changed, inputs))


# -- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("make", [branches, net])
def test_each_layer_is_measured_as_pruning_it_alone_does_it(
    make: Callable[..., tuple[Program, PassContext]], score: Score
) -> None:
    program, context = make(0.5, 2.0) if make is branches else make()
    pattern = Pattern.parse("2:4")
    sites, _ = find_sites(program, pattern, Where())
    assert context.calibration is not None
    batches = list(context.calibration)
    way = Way(LAYER_METHODS[score], score != "magnitude", pattern, refit=Sparsify().refit)
    ones = dict.fromkeys((s.name for s in sites), (1.0,))
    found = measure_alone(program, sites, ones, way, batches)
    assert list(found) == [s.name for s in sites]
    for site in sites:
        only = Sparsify(score=score, where=Where(include=(site.reader.name,)))
        pruned = only.run(program.clone(), context).program
        assert list(pruned.layouts) == [site.name]
        alone = sum(error(program, pruned, *b) for b in batches) / len(batches)
        assert found[site.name][0].noise == pytest.approx(alone, rel=1e-4)
        assert alone > 0


def test_a_tied_table_is_measured_with_its_lookups() -> None:
    program = small_lm()
    context = calibrated(program, 2)
    assert context.calibration is not None
    batches = list(context.calibration)
    pattern = Pattern.parse("2:4")
    sites, _ = find_sites(program, pattern, Where(), tied=True)
    way = Way(LAYER_METHODS["magnitude"], False, pattern)
    found = measure_alone(program, sites, dict.fromkeys((s.name for s in sites), (1.0,)), way,
                          batches)  # fmt: skip
    table = next(s for s in sites if len(s.weight.readers) > 1)
    both = tuple(reader.name for reader in table.weight.readers)
    only = Sparsify(score="magnitude", tied=True, where=Where(include=both))
    pruned = only.run(program.clone(), context).program
    alone = sum(error(program, pruned, *b) for b in batches) / 2
    assert found[table.name][0].noise == pytest.approx(alone, rel=1e-4)


def test_more_zeros_are_more_error() -> None:
    program, context = branches(1.0, 1.0)
    sites, _ = find_sites(program, Pattern("unstructured"), Where())
    assert context.calibration is not None
    way = Way(LAYER_METHODS["wanda"], True, Pattern("unstructured"))
    tried = dict.fromkeys((s.name for s in sites), (0.0, 0.3, 0.6, 0.9))
    for results in measure_alone(program, sites, tried, way, list(context.calibration)).values():
        noises = [r.noise for r in results]
        assert noises[0] == 0
        assert noises == sorted(noises)
    assert Alone().output_db == float("inf")


# -- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize("loud", [0, 1, 2])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "obc", "sparsegpt"])
def test_the_layer_that_counts_most_stays_dense(loud: int, score: Score) -> None:
    gains = [0.2, 0.3, 0.4]
    gains[loud] = 3.0
    program, context = branches(*gains)
    remarks: list[str] = []
    context.remark = remarks.append
    result = run_checked(program, Sparsify(score=score, layers="sensitivity", ratio=0.3), context)
    names = {f"layers.{n}.weight" for n in range(3)}
    assert set(shares(result)) == names - {f"layers.{loud}.weight"}
    assert set(shares(result).values()) == {0.5}
    (refusal,) = result.refusals
    worst = result.operators[0]
    assert worst.node == refusal.node
    assert worst.becomes == "dense"
    assert f"pruned alone it costs {worst.output_db:.1f} dB" in refusal.reason
    assert [row.becomes for row in result.operators[1:]] == ["50% zero", "50% zero"]
    assert [row.output_db for row in result.operators] == sorted(
        row.output_db for row in result.operators
    )
    assert "2 of 3 layers are pruned, 1 stay dense: 0.3333 of their weights go" in remarks[-1]


@pytest.mark.parametrize(("pattern", "unit"), [("unstructured", 1), ("4x4", 16)])
@pytest.mark.parametrize("ratio", [0.37, 0.5, 0.8])
def test_the_target_is_met_to_the_last_unit(pattern: str, unit: int, ratio: float) -> None:
    program, context = branches(0.2, 1.0, 3.0)
    options: dict[str, Any] = {"pattern": pattern, "ratio": ratio, "layers": "sensitivity"}
    result = run_checked(program, Sparsify(**options), context)
    zeros = sum(int((tensor(result.program, n) == 0).sum()) for n in program.constants if "l" in n)
    assert zeros == int(3 * 32 * 32 * ratio / unit) * unit
    found = shares(result)
    quiet, middle, loud = (found.get(f"layers.{n}.weight", 0.0) for n in range(3))
    assert quiet >= middle >= loud
    assert quiet > loud
    again = run_checked(program, Sparsify(**options), context)
    assert shares(again) == found


def test_groups_of_a_convolution_give_up_equally_many() -> None:
    program, context = net()
    result = run_checked(
        program,
        Sparsify(pattern="unstructured", layers="sensitivity", ratio=0.6, least=0.3),
        context,
    )
    apart = tensor(result.program, "apart.weight") == 0
    assert int(apart[:8].sum()) == int(apart[8:].sum()) > 0
    numel = sum(tensor(program, f"{n}.weight").numel() for n in ("apart", "taps", "head"))
    zeros = sum(
        int((tensor(result.program, f"{n}.weight") == 0).sum()) for n in ("apart", "taps", "head")
    )
    assert int(numel * 0.6) - 1 <= zeros <= int(numel * 0.6)


def test_bounds_hold_for_every_layer() -> None:
    program, context = branches(0.2, 1.0, 3.0)
    bounded = Sparsify(pattern="unstructured", layers="sensitivity", ratio=0.5, least=0.4, most=0.6)
    for share in shares(run_checked(program, bounded, context)).values():
        assert 0.4 - 1e-3 <= share <= 0.6


def test_the_rest_of_the_model_is_what_it_was() -> None:
    program, context = branches(0.2, 3.0)
    result = run_checked(program, Sparsify(layers="sensitivity", ratio=0.25), context)
    assert torch.equal(
        tensor(result.program, "layers.1.weight"), tensor(program, "layers.1.weight")
    )


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_a_trained_net_keeps_more_than_with_equal_ratios(score: Score) -> None:
    model, x = trained()
    program = capture(model, (x[:64],))
    context = PassContext(calibration=spool(list(x[:256].split(64)), program))
    options: dict[str, Any] = {"pattern": "unstructured", "score": score, "ratio": 0.7}
    plain = run_checked(program, Sparsify(**options), context).program
    chosen = run_checked(program, Sparsify(**options, layers="sensitivity"), context).program
    zeros = [sum(int((v == 0).sum()) for v in weights(p)) for p in (plain, chosen)]
    assert zeros[0] <= zeros[1] == int(0.7 * sum(v.numel() for v in weights(program)))
    errors = [sum(error(program, p, b) for b in x[256:].split(64)) for p in (plain, chosen)]
    assert errors[1] < 0.9 * errors[0]


def test_no_other_set_of_layers_is_much_better_on_other_inputs() -> None:
    model, x = trained()
    program = capture(model, (x[:64],))
    context = PassContext(calibration=spool(list(x[:256].split(64)), program))
    sparse = Sparsify(layers="sensitivity", ratio=0.25)
    chosen = run_checked(program, sparse, context).program
    sizes = {n.name: tensor(program, f"{2 * i}.weight").numel() // 2
             for i, n in enumerate(n for n in program.operators if "linear" in n.name)}  # fmt: skip
    target = 0.25 * 2 * sum(sizes.values())
    others = []
    for count in range(1, 5):
        for names in combinations(sizes, count):
            if sum(sizes[n] for n in names) >= target:
                pruned = Sparsify(where=Where(include=names)).run(program.clone(), context).program
                others.append(sum(error(program, pruned, b) for b in x[256:].split(64)))
    assert len(others) > 5
    reached = sum(error(program, chosen, b) for b in x[256:].split(64))
    assert reached < 1.2 * min(others)


def weights(program: Program) -> list[Tensor]:
    return [tensor(program, n) for n in program.constants if n.endswith("weight")]


def trained() -> tuple[nn.Module, Tensor]:
    """A net that has learned which of four corners a point is nearest to."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    corners = drawn(4, 16, seed=5)
    x = drawn(512, 16, seed=6)
    labels = torch.cdist(x, corners).argmin(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), x


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "obc"])
def test_it_wants_calibration(score: Score) -> None:
    asked = Sparsify(score=score, layers="sensitivity", ratio=0.3)
    assert asked.needs() == {Fact.CALIBRATED}
    program, _ = branches(1.0, 2.0)
    with pytest.raises(RequirementError, match="there are none"):
        asked.run(program, PassContext())


def test_scores_of_the_loss_want_calibration_too() -> None:
    asked = Sparsify(score="fisher", layers="sensitivity", ratio=0.3, scope="layer")
    assert asked.needs() == {Fact.CALIBRATED, Fact.LABELS, Fact.LOSS}
    program, context = branches(0.2, 3.0)
    context.labeled = [(drawn(24, 32, seed=s), drawn(24, 32, seed=9)) for s in range(4)]
    context.loss = lambda outputs, batch: (outputs[0] - batch[1]).square().mean()
    result = run_checked(program, Sparsify(score="fisher", layers="sensitivity", ratio=0.25),
                         context)  # fmt: skip
    assert set(shares(result)) == {"layers.0.weight"}


def test_a_target_beyond_the_pattern_is_an_error_before_anything_is_measured() -> None:
    program, context = branches(1.0, 2.0)
    told: list[tuple[int, int]] = []
    context.tell = lambda done, total: told.append((done, total))
    with pytest.raises(MisusedPassError, match=r"cannot be met.*gives 0\.5000"):
        Sparsify(layers="sensitivity", ratio=0.6).run(program, context)
    assert not told


def test_progress_goes_on_from_measuring_to_pruning() -> None:
    program, context = branches(1.0, 2.0)
    told: list[tuple[int, int]] = []
    context.tell = lambda done, total: told.append((done, total))
    Sparsify(layers="sensitivity", ratio=0.3, pattern="unstructured").run(program, context)
    assert [done for done, _ in told] == [0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"least": 0.6}, "in this order"),
        ({"most": 0.4}, "in this order"),
        ({"most": 1.0}, "in this order"),
        ({"batches": 0}, "measure nothing"),
        ({"pattern": "unstructured", "score": "fisher"}, "scope=layer"),
        ({"pattern": "4x4", "score": "magnitude", "scope": "global"}, "scope=layer"),
        ({"layers": "uniform", "most": 0.9}, "are of layers=sensitivity"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], because: str) -> None:
    with pytest.raises(ValueError, match=because):
        Sparsify(**{"layers": "sensitivity", **options})
