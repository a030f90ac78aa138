"""What a sweep keeps does not grow with the samples, and stays small beside the model itself."""

import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.calibrate import spool
from planish.passes.observe import observe
from planish.tools.bench.live_bytes import LiveBytes
from tests.support.real_models import loaded

SKETCH_BYTES = 1 << 17


class Layers(nn.Module):
    """Wide enough that values outweigh their sketches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def layers() -> Program:
    dims = ({0: Dim("batch", max=64)},)
    return capture(Layers().eval(), (torch.randn(2, 128, 64),), dynamic_shapes=dims)


def test_memory_does_not_grow_with_the_batches() -> None:
    program = layers()
    peaks = []
    for batches in (2, 12):
        with spool([torch.randn(8, 128, 64) for _ in range(batches)], program) as held:
            with LiveBytes() as live:
                statistics = observe(
                    program, ["linear", "relu", "linear_1"], held, per_channel=["relu"]
                )
            assert live.now <= 3 * SKETCH_BYTES + (1 << 21)  # and one workspace
            peaks.append(live.peak)
            assert statistics.sketch("relu").histogram.total == batches * 8 * 128 * 64
    assert peaks[1] <= 1.01 * peaks[0]


def test_minilm_is_calibrated_within_twice_the_memory_of_running_it() -> None:
    real, network = loaded("minilm")
    args, kwargs = real.inputs(*real.sizes[0])
    program = capture(network, args, kwargs, dynamic_shapes=real.dynamic_shapes)
    batch = real.inputs(8, 128)[1]
    values = [
        n.name
        for n in program.operators
        if isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].is_floating_point()
        # As many values as a static int8 recipe needs: what linears read and give.
        and any("linear" in str(op.target) for op in (n, *n.users))
    ]
    assert len(values) > 50
    with spool([batch], program) as held:
        (inputs,) = held
        with LiveBytes() as plain:
            run(program, inputs)
        with LiveBytes() as live:
            observe(program, values, held, padding_mask="attention_mask")
    assert live.peak < 2 * plain.peak
