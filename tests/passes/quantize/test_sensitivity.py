"""The one sweep that ranks operators, held against measuring each of them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.compare import measure
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.one_by_one import alone
from planish.passes.quantize.outputs import Padding, noise
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.restore import quantized_operators, restore
from planish.passes.quantize.sensitivity import NotDerivableError, sensitivities
from tests.support import real_models


class Mixed(nn.Module):
    """A convolution, a norm, an attention, a residual; one layer of huge weights on tiny values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.up.weight[:, 0] *= 60  # one scale for each row: the others lose their bits
            self.norm.weight[0] = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).transpose(1, 2)
        y = y + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        y = self.norm(y)
        y = y + self.down(F.gelu(self.up(y)))
        result: Tensor = self.head(y)
        return result


def _both(
    module: nn.Module, batches: list[Any], **options: Any
) -> tuple[Program, Program, tuple[str, ...]]:
    """The program with all operators restored, the quantized one, and their names."""
    first = batches[0]
    program = capture(module.eval(), first if isinstance(first, tuple) else (first,))
    held = spool(batches, program)
    quantized = Quantize(**options).run(program.clone(), PassContext(calibration=held)).program
    rewriter = Rewriter(quantized.clone(), "test")
    names, refusals = restore(rewriter, program, [n.name for n in quantized_operators(quantized)])
    assert not refusals
    restored = rewriter.finish()
    for inputs in held:
        assert measure(run(program, inputs), run(restored, inputs)).equal
    return restored, quantized, names


def _mixed(**options: Any) -> tuple[Program, Program, tuple[str, ...], list[tuple[Tensor]]]:
    torch.manual_seed(3)
    batches = [(torch.randn(2, 3, 24),) for _ in range(12)]
    return *_both(Mixed(), list(batches), **options), batches


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight"])
def test_the_sweep_agrees_with_measuring_each_operator_alone(mode: str) -> None:
    restored, quantized, names, batches = _mixed(mode=mode)
    estimate = {
        e.node: e
        for e in sensitivities(
            restored, quantized, names, batches, generator=_generator(), projections=8
        )
    }
    truth = alone(restored, quantized, names, batches)
    assert len(truth) >= 6
    for error in truth:
        # 96 random projections: a deviation of 0.6 dB; three of them, and what is not linear.
        assert abs(estimate[error.node].output_db - error.output_db) < 2.5, error.node
        assert estimate[error.node].own == error.own


def test_the_worst_operator_is_the_one_that_was_made_bad() -> None:
    restored, quantized, names, batches = _mixed(weights="int4", mode="weight")
    ranked = sensitivities(restored, quantized, names, batches, generator=_generator())
    node = next(n for n in quantized.operators if n.name == ranked[0].node)
    assert "up" in str(node.meta["nn_module_stack"])
    assert [e.output_db for e in ranked] == sorted(e.output_db for e in ranked)


def test_alone_is_what_one_quantized_operator_does() -> None:
    """Known answer: a program in which all other operators are restored."""
    floating, quantized, names, batches = _mixed()
    for name in names[:3]:
        rewriter = Rewriter(quantized.clone(), "test")
        # Its own operands are the values in floating point, since all before it is restored.
        restore(rewriter, floating, [n for n in names if n != name])
        one = rewriter.finish()
        expected = sum(noise(run(floating, b), run(one, b)) for b in batches) / len(batches)
        (found,) = alone(floating, quantized, [name], batches)
        assert math.isclose(found.output_db, -10 * math.log10(expected), rel_tol=1e-3)


def test_an_operator_that_no_output_reads_has_no_effect() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), (self.b(x) > 0).any()

    torch.manual_seed(0)
    batches = [(torch.randn(4, 8),) for _ in range(4)]
    restored, quantized, names = _both(Two(), list(batches))
    ranked = sensitivities(restored, quantized, names, batches, generator=_generator())
    assert [e.output_db == math.inf for e in ranked] == [False, True]


def test_outputs_without_a_derivative_are_said() -> None:
    class Class(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).argmax(-1)

    torch.manual_seed(0)
    batches = [(torch.randn(4, 8),) for _ in range(4)]
    restored, quantized, names = _both(Class(), list(batches))
    with pytest.raises(NotDerivableError):
        sensitivities(restored, quantized, names, batches, generator=_generator())
    assert len(alone(restored, quantized, names, batches)) == 1


def test_an_operator_of_our_own_passes_derivatives() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            turned = torch.ops.planish.rotary_embedding(self.a(x), x.cos(), x.sin())
            result: Tensor = self.b(turned)
            return result

    torch.manual_seed(0)
    batches = [(torch.randn(4, 8),) for _ in range(16)]
    restored, quantized, names = _both(Rotated(), list(batches))
    estimate = sensitivities(
        restored, quantized, names, batches, generator=_generator(), projections=8
    )
    truth = alone(restored, quantized, names, batches)
    for error in truth:
        (found,) = [e for e in estimate if e.node == error.node]
        assert abs(found.output_db - error.output_db) < 2.5


class Tokens(nn.Module):
    """Padding holds garbage, which quantizing ruins; real tokens are small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.a(x))) + (1 - mask)[..., None]
        return result


@pytest.mark.parametrize("ranking", [sensitivities, alone])
def test_padding_does_not_count(ranking: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    batches = []
    for _ in range(8):
        x = torch.randn(2, 6, 8)
        x[1, 3:] *= 50
        batches.append((x, mask))
    restored, quantized, names = _both(Tokens(), list(batches))
    padding = Padding.named(quantized, "mask")
    options = {"generator": _generator()} if ranking is sensitivities else {}
    everything = ranking(restored, quantized, names, batches, **options)
    masked = ranking(restored, quantized, names, batches, padding=padding, **options)
    # Only the real tokens, by hand.
    expected = 0.0
    for x, m in batches:
        keep = m.bool()
        b, a = run(restored, (x, m))[0][keep], run(quantized, (x, m))[0][keep]
        expected += noise([b], [a]) / len(batches)
    total = sum(10 ** (-e.output_db / 10) for e in masked)
    assert math.isclose(10 * math.log10(total / expected), 0.0, abs_tol=3.0)
    assert [e.output_db for e in masked] != [e.output_db for e in everything]


@pytest.mark.slow
def test_the_sweep_ranks_the_operators_of_a_real_network() -> None:
    """MiniLM: the estimated error is the true one, over three orders of magnitude."""
    description, module = real_models.loaded("minilm")
    del description
    kwargs = real_models.inputs("minilm", 1)[1]
    program = capture(module, (), kwargs)
    batches = [program.samples[0]]
    held = spool([dict(kwargs)], program)
    quantized = Quantize().run(program.clone(), PassContext(calibration=held)).program
    rewriter = Rewriter(quantized.clone(), "test")
    names, _ = restore(rewriter, program, [n.name for n in quantized_operators(quantized)])
    restored = rewriter.finish()
    estimate = sensitivities(
        restored, quantized, names, batches, generator=_generator(), projections=24
    )
    truth = {e.node: e.output_db for e in alone(restored, quantized, names, batches)}
    pairs = torch.tensor([(e.output_db, truth[e.node]) for e in estimate]).T
    assert float((pairs[0] - pairs[1]).abs().median()) < 1.5
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.9
