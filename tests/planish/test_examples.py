"""Example inputs: every form a caller may pass, and what models advertise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import planish
from planish.examples import advertised, normalize


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a) - b


A, B = torch.randn(2, 3), torch.randn(2, 3)


@pytest.mark.parametrize(
    "given",
    [(A, B), {"a": A, "b": B}, ((A,), {"b": B}), ((), {"b": B, "a": A})],
    ids=["args", "kwargs", "both", "kwargs-in-another-order"],
)
def test_every_form_gives_the_same_program(given: Any) -> None:
    result = planish.optimize(TwoInputs().eval(), given)
    assert sorted(result.program.signature.tensor_names) == ["a", "b"]
    expected = TwoInputs()(A, B)
    assert torch.equal(result.model(A, B) if given != {} else expected, expected)
    assert torch.equal(result.model(b=B, a=A), expected)


def test_a_bare_tensor_is_one_argument() -> None:
    examples = normalize(A)
    assert (len(examples.args), dict(examples.kwargs)) == (1, {})


def test_a_pair_of_tensors_is_two_arguments() -> None:
    assert len(normalize((A, B)).args) == 2


def _tiny(kind: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval()


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


def test_an_encoder_gets_tokens_and_a_mask_with_padding() -> None:
    result = planish.optimize(_tiny("Bert", **TEXT, max_position_embeddings=32))
    signature = result.program.signature
    assert signature.tensor_names == ("input_ids", "attention_mask")
    assert set(signature.symbols.values()) == {"batch", "sequence"}
    ids, mask = result.program.samples[0]
    assert int(ids.max()) < 50
    assert mask.min() == 0
    assert bool((mask[:, 0] == 1).all())
    assert "example inputs were made from the transformers configuration" in result.report.remarks


def test_a_decoder_runs_without_a_cache() -> None:
    model = _tiny("Llama", **TEXT, num_key_value_heads=1, max_position_embeddings=64)
    result = planish.optimize(model)
    assert result.program.signature.output_names == ("last_hidden_state",)
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    answer = result.model(input_ids=ids, attention_mask=mask)  # use_cache need not be repeated
    assert torch.allclose(answer.last_hidden_state, expected, atol=1e-5)
    assert type(answer).__name__ == "BaseModelOutputWithPast"


def test_a_vision_transformer_gets_images() -> None:
    options = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    result = planish.optimize(_tiny("ViT", **options, image_size=16, patch_size=8))
    assert tuple(result.program.samples[0][0].shape) == (2, 3, 16, 16)
    assert dict(result.program.signature.symbols).popitem()[1] == "batch"


def test_timm_models_say_their_input_size() -> None:
    class Claims(nn.Conv2d):
        default_cfg = {"input_size": (3, 20, 24)}  # noqa: RUF012 - as timm has it

    examples = advertised(Claims(3, 4, 3).eval())
    assert tuple(examples.args[0].shape) == (2, 3, 20, 24)
    result = planish.optimize(Claims(3, 4, 3).eval())
    assert "f32[batch, 3, 20, 24]" in str(result.program)


def test_sizes_that_cannot_vary_are_fixed_with_a_remark() -> None:
    class Rigid(nn.Module):
        default_cfg = {"input_size": (3, 4, 4)}  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).reshape(2, 48)

    result = planish.optimize(Rigid().eval())
    assert "f32[2, 3, 4, 4]" in str(result.program)


def test_inference_of_inputs_is_seeded() -> None:
    model = _tiny("Bert", **TEXT, max_position_embeddings=32)
    first, second = (advertised(model, seed=3).kwargs["input_ids"] for _ in range(2))
    other = advertised(model, seed=4).kwargs["input_ids"]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_remarks_on_dynamic_dimensions_that_tracing_fixed_or_bounded() -> None:
    class Fixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1) * 1.5

    class Bounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 4 else x * 3

    auto, x = ({0: Dim.AUTO},), torch.randn(2, 3)
    (fixed,) = planish.optimize(Fixes().eval(), x, dynamic_shapes=auto).report.remarks
    assert fixed.startswith("1 of 1 dynamic dimensions were fixed")
    assert "f32[2, 3]" in fixed
    (bounded,) = planish.optimize(Bounds().eval(), x, dynamic_shapes=auto).report.remarks
    assert "may be 0 to 4" in bounded
    named = ({0: Dim("batch", max=4)},)
    assert not planish.optimize(Bounds().eval(), x, dynamic_shapes=named).report.remarks
