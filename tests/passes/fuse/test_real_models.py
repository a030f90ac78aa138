"""The eager forms of known architectures come back as whole operators, at dynamic sizes."""

import pytest
import torch
from torch import nn

from planish.ir.capture import capture
from planish.passes.base import Pass, PassContext
from planish.passes.fuse.activations import RecoverActivations
from planish.passes.fuse.attention import RecoverAttention
from planish.passes.fuse.norms import RecoverNorms
from planish.passes.fuse.parallel_linears import FuseParallelLinears
from planish.passes.fuse.rotary import RecoverRotary
from tests.passes.fuse.modules import tiny
from tests.support.check import assert_equal

PASSES: tuple[Pass, ...] = (
    RecoverNorms(),
    RecoverActivations(),
    RecoverRotary(),
    RecoverAttention(),
    FuseParallelLinears(),
)
# Changes of each pass, in that order.
EXPECTED = {
    "bert": (0, 0, 0, 1, 1),
    "gpt2": (0, 1, 0, 1, 0),
    "llama": (3, 0, 2, 1, 2),
    "t5": (3, 0, 0, 1, 1),
    "vit": (0, 0, 0, 1, 1),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_recovers_what_an_eager_model_writes_out(kind: str) -> None:
    model, inputs, dims = tiny(kind)
    program = before = capture(model, (), inputs, dynamic_shapes=dims)
    changes = []
    for pass_ in PASSES:
        result = pass_.run(program.clone(), PassContext())
        program = result.program
        changes.append(len(result.changes))
    assert tuple(changes) == EXPECTED[kind]
    left = {n.target for n in program.operators}
    assert torch.ops.aten.softmax.int not in left
    assert torch.ops.aten.rsqrt.default not in left
    assert_equal(before, program)


def test_a_model_that_calls_whole_operators_is_left_alone() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu").eval()
    program = capture(layer, (torch.zeros(2, 3, 8),))
    for pass_ in PASSES[:4]:
        assert pass_.run(program.clone(), PassContext()).changes == ()
