"""Linears for sparse tensor cores: which, on what, and the refusals; the kernels where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir.errors import UnsupportedError
from planish.sparse_cuda import LEAST_CAPABILITY, SparseModule, check_gpu, choose, on_device

PRUNED = "sparsify{score=magnitude}"


class Net(nn.Module):
    """Linears of good and bad shapes, a convolution, and a table that is made on a device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(64, 64, 1)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.odd = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[-1], device=x.device) / 64
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.odd(x + self.down(self.up(x).relu()))
        return y


X = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))


def optimized(recipe: str) -> planish.Optimized:
    seen = [torch.randn(2, 16, 64) for _ in range(3)]
    return planish.optimize(Net().eval(), X, recipe=recipe, target="onnx", calibration=seen)


def test_halves_of_the_right_shape_are_chosen_and_the_others_named() -> None:
    choice = choose(optimized(f"{PRUNED}, cast-half").program)
    assert set(choice.sparse) == {"up.weight", "down.weight"}
    assert set(choice.dense) == {"odd.weight", "conv.weight"}
    assert "40 x 64, no multiple of 32 x 64" in choice.dense["odd.weight"]
    assert "which is no linear" in choice.dense["conv.weight"]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (PRUNED, "it is f32, not f16 or bf16"),
        ("sparsify{score=magnitude,pattern=unstructured}, cast-half", "not 2:4 along its inputs"),
        (f"{PRUNED}, round-weights", "which is no linear"),
    ],
)
def test_other_weights_stay_dense(recipe: str, reason: str) -> None:
    choice = choose(optimized(recipe).program)
    assert not choice.sparse
    assert any(reason in why for why in choice.dense.values())


def test_a_pattern_that_contains_2_4_counts() -> None:
    choice = choose(optimized("sparsify{score=magnitude,pattern=1:4}, cast-half").program)
    assert set(choice.sparse) == {"up.weight", "down.weight"}


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Make torch say that it has one GPU of a capability, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("device", "capability", "message"),
    [
        ("cpu", (9, 0), "cpu has no kernels for 2:4 weights"),
        ("cuda", None, "torch sees no CUDA GPU"),
        ("cuda", (7, 5), "cuda has compute capability 7.5, without sparse tensor cores"),
        ("cuda:3", (9, 0), "there is no cuda:3: 1 GPUs"),
    ],
)
def test_devices_that_cannot_are_refused(
    device: str,
    capability: tuple[int, int] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, capability)
    with pytest.raises(UnsupportedError, match=message):
        optimized(f"{PRUNED}, cast-half").sparse_model(device)


@pytest.mark.parametrize("capability", [LEAST_CAPABILITY, (8, 6), (9, 0), (10, 0)])
def test_devices_that_can(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, capability)
    assert check_gpu("cuda") == torch.device("cuda")
    assert check_gpu("cuda:0") == torch.device("cuda:0")


def test_a_program_with_nothing_to_pack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (8, 0))
    with pytest.raises(UnsupportedError, match=r"no weight can be packed as 2:4: @.*it is f32"):
        optimized(PRUNED).sparse_model()
    with pytest.raises(UnsupportedError, match="none is sparse"):
        optimized("cast-half").sparse_model()


def test_what_operators_make_moves_with_the_constants() -> None:
    program = optimized(f"{PRUNED}, cast-half").program
    meta = on_device(program, torch.device("meta"))
    assert {c.device.type for c in meta.constants.values() if isinstance(c, Tensor)} == {"meta"}
    placed = [n for n in meta.operators if "device" in n.kwargs]
    assert all(n.kwargs["device"] == torch.device("meta") for n in placed)
    assert {c.device.type for c in program.constants.values() if isinstance(c, Tensor)} == {"cpu"}
    for node in program.operators:
        assert node.kwargs.get("device") in (None, torch.device("cpu"))


def test_the_chosen_weights_are_packed_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    result = optimized(f"{PRUNED}, cast-half")
    packed: list[Tensor] = []

    def pack(dense: Tensor) -> Tensor:
        packed.append(dense)
        return dense.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    model = SparseModule(result.program, torch.device("cpu"), choose(result.program))
    assert [tuple(weight.shape) for weight in packed] == [(128, 64), (64, 128)]
    held = {id(tensor) for tensor in model.body.state_dict(keep_vars=True).values()}
    assert not held & {id(tensor) for tensor in packed}  # the dense ones are gone
    assert torch.equal(model(X), result.model(X))
    assert set(result.program.layouts) == {"up.weight", "down.weight", "odd.weight", "conv.weight"}


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY,
    reason="needs a GPU with sparse tensor cores",
)
def test_sparse_kernels_compute_what_dense_ones_do() -> None:
    result = optimized(f"{PRUNED}, cast-half")
    model = result.sparse_model("cuda")
    assert set(model.choice.sparse) == {"up.weight", "down.weight"}
    packed = {n: t for n, t in model.body.state_dict().items() if n in model.choice.sparse}
    assert all("SemiStructured" in type(tensor).__name__ for tensor in packed.values())
    with torch.no_grad():
        found, expected = model(X.cuda()).cpu().float(), result.model(X).float()
    error = float((found - expected).norm() / expected.norm())
    assert error < 5e-3
