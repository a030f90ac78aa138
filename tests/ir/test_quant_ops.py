"""The quantizing operators mean what ONNX means by them, and carry gradients where they can."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.ir.quant_ops import dequantize, dynamic_quantize, fake_quantize, quantize
from planish.ir.quantscheme import INTEGERS, QuantScheme
from tests.support.strategies import normal, seeds

LAYOUTS = {"tensor": (None, 0), "axis 0": (0, 0), "axis 2": (2, 0), "blocks": (1, 4)}
ops = torch.ops.planish


def case(dtype: str, layout: str, seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Values with ties and values beyond the range, with a scale and a zero point."""
    axis, block = LAYOUTS[layout]
    x = normal((3, 8, 5), seed)
    granularity = "tensor" if axis is None else "block" if block else "channel"
    scheme = QuantScheme(
        dtype=dtype,  # type: ignore[arg-type]  # one of a Literal
        granularity=granularity,  # type: ignore[arg-type]  # one of a Literal
        axis=axis,
        block_size=block,
        symmetric=False,
    )
    # Powers of two make products exact, so that halves are ties.
    scale, zero = scheme.qparams_of(x * 0.7)
    scale = torch.exp2(scale.log2().round())
    ties = x.flatten()[: x.numel() // 2]
    step = float(scale.flatten()[0])
    x.flatten()[: x.numel() // 2] = ((ties / step).round() + 0.5) * step
    options: dict[str, Any] = {"dtype": dtype}
    if axis is not None:
        options["axis"] = axis
    if block:
        options["block_size"] = block
    return x, scale, zero, options


def onnx_model(dtype: str, options: dict[str, Any], scale: Tensor, zero: Tensor) -> Any:
    """A model of QuantizeLinear and DequantizeLinear; outputs both."""
    import onnx
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, dtype.upper())
    where = {key: options[key] for key in ("axis", "block_size") if key in options}
    values = zero.flatten().tolist()
    shape = list(scale.shape)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **where),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **where),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8, 5])],
        [
            helper.make_tensor_value_info("q", kind, [3, 8, 5]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 8, 5]),
        ],
        [
            helper.make_tensor("s", TensorProto.FLOAT, shape, scale.flatten().tolist()),
            helper.make_tensor("z", kind, shape, values),
        ],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_those_of_the_onnx_reference(dtype: str, layout: str) -> None:
    from onnx.reference import ReferenceEvaluator

    for seed in range(3):
        x, scale, zero, options = case(dtype, layout, seed)
        model = onnx_model(dtype, options, scale, zero)
        wanted, real = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
        codes = quantize(x, scale, zero, **options)
        assert np.array_equal(codes.numpy().astype(np.int32), np.asarray(wanted).astype(np.int32))
        torch.testing.assert_close(dequantize(codes, scale, zero, **options), torch.tensor(real))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_onnxruntime(dtype: str, layout: str) -> None:
    import onnxruntime

    x, scale, zero, options = case(dtype, layout, 7)
    model = onnx_model(dtype, options, scale, zero)
    del model.graph.output[0]  # numpy has no 4-bit integers
    settings_ = onnxruntime.SessionOptions()
    settings_.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings_)
    (real,) = session.run(None, {"x": x.numpy()})
    codes = quantize(x, scale, zero, **options)
    assert torch.equal(dequantize(codes, scale, zero, **options), torch.tensor(real))


@settings(max_examples=20, deadline=None)
@given(seeds(), st.sampled_from([1.0, -1.0, 0.0]), st.floats(0.01, 50))
def test_dynamic_ranges_are_those_of_onnxruntime(seed: int, sign: float, size: float) -> None:
    """Mixed signs; only positive or only negative values; nothing but zeros."""
    x = normal((4, 9), seed) * size
    if sign:
        x = x if seed % 3 == 0 else x.abs() * sign
    else:
        x = torch.zeros_like(x)
    codes, scale, zero = (torch.tensor(v) for v in _dynamic_session().run(None, {"x": x.numpy()}))
    mine = dynamic_quantize(x)
    torch.testing.assert_close(mine[1], scale, rtol=1e-6, atol=0)
    assert int(mine[2]) == int(zero)
    assert int((mine[0].int() - codes.int()).abs().max()) <= 1  # the last bit of the scale
    assert float((mine[0] != codes).float().mean()) < 0.1


def _dynamic_session() -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])],
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 9])],
        [
            helper.make_tensor_value_info("q", TensorProto.UINT8, [4, 9]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_dynamic_int8_is_symmetric_and_tokens_have_scales_of_their_own() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [10.0, 0.0, 5.0]])
    codes, scale, zero = dynamic_quantize(x, dtype="int8")
    assert float(scale) == pytest.approx(10 / 127)
    assert int(zero) == 0
    codes, scale, zero = dynamic_quantize(x, per_token=True)
    assert scale.shape == zero.shape == (2, 1)
    torch.testing.assert_close(scale.flatten(), torch.tensor([3 / 255, 10 / 255]))
    assert zero.flatten().tolist() == [170, 0]
    back = dequantize(codes, scale, zero, dtype="uint8", axis=-1, block_size=3)
    assert bool(((back - x).abs() <= scale).all())


def test_pairs_have_the_shapes_that_fake_tensors_say() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in ("int8", "uint4"):
        for layout in LAYOUTS:
            x, scale, zero, options = case(dtype, layout, 0)
            real = ops.quantize(x, scale, zero, **options)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in (x, scale, zero)]
                codes = ops.quantize(*fakes, **options)
                back = ops.dequantize(codes, *fakes[1:], **options)
            assert (codes.shape, codes.dtype) == (real.shape, real.dtype)
            assert (back.shape, back.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zero_point": torch.tensor(0)}, "a zero point of uint8"),
        ({"x": torch.tensor([1, 2, 3])}, "takes real numbers"),
        ({"scale": torch.ones(2), "zero_point": torch.zeros(2).byte()}, "one scale"),
        ({"axis": 1}, "there is no axis 1"),
        ({"scale": torch.ones(2), "zero_point": torch.zeros(2).byte(), "axis": 0}, "for each"),
        ({"axis": 0, "block_size": 2}, "scales of the rank"),
    ],
)
def test_impossible_calls_are_refused_when_types_are_derived(
    changes: dict[str, Any], says: str
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given_: dict[str, Any] = {
        "x": torch.ones(3),
        "scale": torch.tensor(1.0),
        "zero_point": torch.tensor(0, dtype=torch.uint8),
        "dtype": "uint8",
        **changes,
    }
    tensors = [given_.pop(name) for name in ("x", "scale", "zero_point")]
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=says):
        ops.quantize(*(mode.from_tensor(t) for t in tensors), **given_)


def test_gradients_pass_straight_through_inside_of_the_range() -> None:
    x = torch.tensor([-1.0, -0.4, 0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int8)
    y = fake_quantize(x, scale, zero, dtype="int4")
    y.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 0]  # -1.0, 0.9 and 5.0 saturate at -0.8 and 0.7
    # Of the scale: codes - x / scale inside, the bound outside.
    inside = [-4 + 4, 3 - 3]
    assert float(scale.grad) == pytest.approx(sum(inside) - 8 + 7 + 7, abs=1e-4)


def test_the_gradient_of_a_clip_keeps_the_residue_of_rounding() -> None:
    """PACT+ on a step of 2/3: ``(round(z) - z) / n`` inside, 1 above the clip, 0 below it."""
    x = torch.tensor([-1.0, 0.4, 1.9, 12.5])
    levels = 15
    clips = torch.full((4,), levels * 2 / 3, requires_grad=True)  # one for each element
    zero = torch.zeros(4, dtype=torch.uint8)
    y = fake_quantize(x, clips / levels, zero, dtype="uint4", axis=0)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 2 / 3, 2.0, 10.0]))
    y.sum().backward()
    assert clips.grad is not None
    # In four levels, n = 3, the two inside are .1333 and .05; here there are fifteen steps.
    expected = torch.tensor([0.0, 0.1333 * 3 / levels, 0.05 * 3 / levels, 1.0])
    torch.testing.assert_close(clips.grad, expected, rtol=1e-3, atol=1e-5)


@given(seeds(), st.sampled_from(["int8", "uint8", "int4", "uint4"]), st.sampled_from([*LAYOUTS]))
def test_the_differentiable_pair_is_the_pair(seed: int, dtype: str, layout: str) -> None:
    x, scale, zero, options = case(dtype, layout, seed)
    pair = dequantize(quantize(x, scale, zero, **options), scale, zero, **options)
    torch.testing.assert_close(fake_quantize(x, scale, zero, **options), pair)


def test_the_widest_integers_saturate_too() -> None:
    x, zero = torch.tensor([1e12, -1e12, 7.0]), torch.tensor(0, dtype=torch.int32)
    codes = quantize(x, torch.tensor(1.0), zero, dtype="int32")
    assert codes.tolist() == [2**31 - 1, -(2**31), 7]


def test_every_integer_of_every_dtype_comes_back() -> None:
    for name, (low, high, storage) in INTEGERS.items():
        if name == "int32":
            continue
        step = max(1, (high - low) // 4096)
        codes = torch.arange(low, high + 1, step, dtype=torch.int32).to(storage)
        zero = torch.tensor((low + high) // 2, dtype=torch.int32).to(storage)
        real = dequantize(codes, torch.tensor(0.25), zero, dtype=name)
        again = quantize(real, torch.tensor(0.25), zero, dtype=name)
        assert torch.equal(again.to(torch.int32), codes.to(torch.int32))
