"""The bench of sparsification: its orders and bounds can fail, and its parts do what they say."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from planish.passes.recipe import Recipe
from planish.tools.bench.sparsity import __main__ as table
from planish.tools.bench.sparsity import cost, smollm2
from planish.tools.bench.sparsity.nets import Digits, SmallResNet, SmallViT, Training
from planish.tools.bench.sparsity.runs import captured, ends, outputs, pruned, step


def row(method: str, sqnr_db: float) -> table.Row:
    return table.Row(method, {"sqnr_db": sqnr_db}, 1, 0, 0.0)


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({"magnitude": 1.0, "wanda": 2.0, "sparsegpt": 5.0}, [True, True, True]),
        ({"magnitude": 1.0, "wanda": 2.0, "sparsegpt": 4.9}, [True, True, False]),
        ({"magnitude": 3.0, "wanda": 2.0, "obc": 1.0}, [False, False, False]),
    ],
)
def test_orders_of_methods_are_judged(figures: dict[str, float], holds: list[bool]) -> None:
    rows = [row(method, sqnr_db) for method, sqnr_db in figures.items()]
    assert list(table.verdicts("minilm", rows).values()) == holds
    # the gain is asked of MiniLM alone
    assert len(table.verdicts("dinov2-s", rows)) == 2


def test_bounds_of_the_language_model_are_judged() -> None:
    magnitude = smollm2.Row("magnitude", 43.0, 10.0, 1.0, 1.0, 9.0, 10.0)
    good = smollm2.Row("sparsegpt", 38.0, 5.0, 599.0, 1.0, 9.0, 10.0)
    bad = smollm2.Row("sparsegpt", 38.1, 5.1, 600.0, 1.0, 10.0, 10.0)
    assert list(smollm2.verdicts([magnitude, good]).values()) == [True, True, True]
    assert list(smollm2.verdicts([magnitude, bad]).values()) == [False, False, False]


def test_calibration_is_spread_and_bounded() -> None:
    batches = [(torch.full((4, 1), i),) for i in range(10)]
    chosen = [int(x[0]) for (x,) in table.spread(batches, 20)]
    assert chosen == [0, 2, 4, 6, 8]
    assert len(table.spread(batches, 1)) == 1
    assert len(table.spread(batches, 1000)) == 10


def test_exponent_is_that_of_a_power() -> None:
    sizes = [512.0, 1024.0, 2048.0]
    assert cost.exponent(sizes, [s**3 / 7 for s in sizes]) == pytest.approx(3)
    rows = [cost.Row(int(s), int(s), s**3.5, s**2, 1.0) for s in sizes]
    of_time, of_memory = cost.verdicts("sparsegpt", rows).values()
    assert (of_time, of_memory) == (False, True)


def test_cost_is_measured_and_printed_as_json() -> None:
    arguments = ["--widths", "32,64", "--ratios", "1", "--rounds", "1", "--json"]
    result = CliRunner().invoke(cost.main, arguments)
    rows = json.loads(result.stdout)["rows"]
    assert [(r["d_row"], r["d_col"]) for r in rows] == [(32, 32), (64, 64)]
    # H inverted, its factor and the weights in float64 at least are alive at once
    assert all(r["peak_mb"] * 1e6 >= 2 * 8 * r["d_col"] ** 2 for r in rows)


@pytest.mark.parametrize("make", [SmallResNet, SmallViT])
def test_nets_are_pruned_but_for_both_ends(make: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(8, 1, 28, 28)
    program = captured(make().eval(), (pixels,))
    first, last = ends(program)
    assert first != last
    everything = pruned(program, step("wanda"), [(pixels,)], count_bytes=True)
    fewer = pruned(program, step("wanda", exclude=(first, last)), [(pixels,)])
    # the first has one channel, and is refused by itself
    assert everything.weights == fewer.weights + 1
    assert everything.refused == 1
    assert everything.peak_bytes > 0
    assert len(fewer.program.layouts) == fewer.weights
    assert not torch.equal(*(outputs(p, [(pixels,)])[0] for p in (program, fewer.program)))


def test_padding_is_named_to_methods_that_read_inputs() -> None:
    assert "padding_mask" not in step("magnitude", padding_mask="mask")
    text = step("obc", exclude=("linear", "linear_9"), padding_mask="mask", ratio=0.9)
    parsed = Recipe.parse(text)
    assert "padding_mask=mask" in text
    assert "sparsify" in str(parsed)


def test_training_may_begin_anywhere_and_repeats() -> None:
    made = torch.Generator().manual_seed(0)
    data = torch.randn(80, 1, 28, 28, generator=made), torch.arange(80) % 10
    train = Training(Digits(data, data), 4)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SmallViT()
        train(model, start=2, stop=None, seed=5)
        weights.append(model.head.weight.detach())
    assert torch.equal(*weights)
