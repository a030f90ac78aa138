"""Eight architectures of the zoo through every stage of the sweep, in this process."""

import pytest

from planish.tools.bench.sweep_stages import Status, sweep_one
from planish.tools.bench.zoo import entry

SAMPLE = (
    "small/in-place",
    "small/dataclass-output",
    "small/hand-attention",
    "small/recurrent",
    "small/batch-of-one",
    "torchvision/squeezenet1_1",
    "transformers/bert",
    "transformers/llama",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_passes(name: str) -> None:
    outcome = sweep_one(entry(name))
    assert outcome.status is Status.PASS, f"{outcome.kind} in {outcome.stage}: {outcome.message}"
    stages = {"build", "capture", "exact", "onnx", "equal", "torchscript"}
    assert set(outcome.seconds) == stages
    assert outcome.facts["torchscript"] == "pass"
