"""The pretrained models are what they are said to be: each scores the figure it is known for."""

import pytest
import torch

from planish.ir.capture import capture
from planish.ir.errors import CaptureError
from planish.tools.bench.real_figures import FIGURES
from planish.tools.bench.real_models import REAL_MODELS
from tests.support.real_models import inputs, loaded

QUICK = {"minilm", "efficientnet-lite0", "g2p-gru"}
IDS = [pytest.param(m.id, marks=[] if m.id in QUICK else pytest.mark.slow) for m in REAL_MODELS]


@pytest.mark.parametrize("model_id", IDS)
def test_known_figure(model_id: str) -> None:
    _, model = loaded(model_id)
    assert not model.training
    with torch.no_grad():
        figure = FIGURES[model_id](model)
    assert figure.holds, f"{figure.name} is {figure.measured}, not {figure.low}..{figure.high}"


def test_mask_has_padding_at_both_sizes() -> None:
    description, _ = loaded("minilm")
    for size in (0, 1):
        _, kwargs = inputs("minilm", size)
        mask = kwargs["attention_mask"]
        assert tuple(mask.shape) == description.sizes[size]
        assert mask[0].all()
        assert (mask[1:, -1] == 0).all()
        assert (mask[:, 0] == 1).all()


def test_greedy_loop_is_refused() -> None:
    description, model = loaded("g2p-gru")
    args, kwargs = inputs("g2p-gru")
    with pytest.raises(CaptureError) as caught:
        capture(model, args, kwargs, dynamic_shapes=description.dynamic_shapes)
    message = str(caught.value)
    assert "depends on the data" in message or "data-dependent" in message
    assert "real_nets.py" in message
