"""What cannot be captured is refused with a reason and a line, and the model is left as it was."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir import capture
from planish.ir.errors import CaptureError, PlanishError, UsageError
from tests.support.lambdas import Lambda

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() < 10:  # the loop of the caller
            x = x + 1
        return x


class Count(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)  # the write of the caller
        return x + self.steps


class Reassign(Count):
    def forward(self, x: Tensor) -> Tensor:
        self.steps = x[0] * 2
        return x + self.steps


class Train(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.add_(1)
        return x + self.weight


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(1)
        return x + self.cache


class Nan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        with torch.no_grad():
            self.inner.weight[1, 2] = float("nan")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("my message")  # the raise of the caller


def half_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    model[1].train()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], tuple[Any, ...], str, str]] = {
    "branch": (
        lambda: Lambda(lambda x: x if x.sum() > 0 else -x),
        (X,),
        "control flow depends on values",
        "test_capture_errors.py",
    ),
    "loop": (Loop, (X,), "control flow depends on values", "the loop of the caller"),
    "item": (lambda: Lambda(lambda x: x * float(x.sum())), (X,), "depends on values", "float"),
    "buffer": (Count, (X,), "writes into the buffer 'steps'", "the write of the caller"),
    "reassigned buffer": (Reassign, (X,), "writes into the buffer 'steps'", ""),
    "parameter": (Train, (X,), "writes into the buffer 'weight'", "self.weight.add_"),
    "tensor attribute": (Plain, (X,), "writes into the buffer 'cache'", "self.cache.add_"),
    "training": (half_training, (X,), r"training mode \(submodule '1', a Dropout\)", ""),
    "nan": (Nan, (X,), "'inner.weight' holds 1 NaN of 9 values", ""),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), (X,), "'weight' is on the meta device", ""),
    "wrong shape": (lambda: nn.Linear(5, 3), (X,), "fails on the example inputs", ""),
    "wrong type": (lambda: nn.Linear(3, 3), (X.long(),), "fails on the example inputs", ""),
    "bad index": (lambda: nn.Embedding(2, 3), (torch.tensor([9]),), "index out of range", ""),
    "raises": (Raises, (X,), "ValueError: my message", "the raise of the caller"),
    "no forward": (nn.Module, (X,), 'missing the required "forward"', ""),
    "numpy": (lambda: Lambda(lambda x: torch.tensor(x.numpy())), (X,), "could not be traced", ""),
    "missing input": (lambda: nn.Linear(3, 3), (), "missing a required argument: 'input'", ""),
    "extra input": (lambda: nn.Linear(3, 3), (X, X), "too many positional arguments", ""),
    "device": (
        lambda: nn.Linear(3, 3),
        (X.to("meta"),),
        "an example input is on meta, the model on cpu",
        "",
    ),
}


def state(model: nn.Module) -> Any:
    """Everything a model holds, as bytes and identities."""
    tensors = {
        name: (id(t), t._version, t.detach().numpy().tobytes() if not t.is_meta else b"")
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    parts = [(m, m.training, sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    plain = {
        (i, name): value.tolist()
        for i, m in enumerate(model.modules())
        for name, value in vars(m).items()
        if isinstance(value, Tensor)
    }
    return tensors, parts, plain


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_the_model_is_untouched(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    build, args, because, line = REFUSED[name]
    torch.manual_seed(0)
    model = build()
    model = model if name == "training" else model.eval()
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(PlanishError, match=because) as caught:
        capture(model, args)
    assert isinstance(caught.value, (CaptureError, UsageError))
    assert line in (caught.value.where or "")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    printed = capfd.readouterr()
    assert "def forward" not in printed.err + printed.out
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize("what", [3, nn.Linear, {"weight": X}, "model.pt", None])
def test_what_is_no_model_is_refused(what: Any) -> None:
    with pytest.raises(UsageError, match=r"expected an nn\.Module"):
        capture(what, (X,))


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Linear(3, 3).eval())
    with pytest.raises(CaptureError, match="the model is TorchScript"):
        capture(scripted, (X,))
    with pytest.raises(CaptureError, match=re.escape("TorchScript (submodule '0')")):
        capture(nn.Sequential(scripted).eval(), (X,))


class Remembers(nn.Module):
    """Keeps state in attributes, as caches and counters do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0
        self.log: list[Any] = []
        self.cache: dict[str, Any] = {"first": 1}
        self.seen = {0}
        self.last = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(x.shape)
        self.cache["x"] = x
        self.seen.add(self.calls)
        self.hidden = self.linear(x)
        self.last = self.hidden[0]
        return self.hidden + torch.rand(3) * 0


def test_a_model_that_remembers_is_left_as_it_was() -> None:
    model = Remembers().eval()
    model.linear.register_forward_hook(lambda module, args, output: output * 1)
    before, generator = state(model), torch.get_rng_state()
    log, cache, last = model.log, model.cache, model.last
    capture(model, (X,))
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model.calls, model.log, model.seen) == (0, [], {0})
    assert model.cache == {"first": 1}
    assert model.log is log
    assert model.cache is cache
    assert model.last is last
    assert not hasattr(model, "hidden")


def test_capturing_twice_gives_the_same_program() -> None:
    from planish.ir import text

    model = Remembers().eval()
    programs = [text(capture(model, (X,)), values=True) for _ in range(2)]
    assert programs[0] == programs[1]


def test_what_the_model_prints_passes(capfd: pytest.CaptureFixture[str]) -> None:
    def loud(x: Tensor) -> Tensor:
        print("to standard output")
        return x * 2

    capture(Lambda(loud), (X,))
    assert "to standard output" in capfd.readouterr().out


def test_a_state_that_a_graph_cannot_hold_is_found() -> None:
    class Alternating(nn.Module):
        state = [0]  # noqa: RUF012 - shared by all instances, so nobody puts it back

        def forward(self, x: Tensor) -> Tensor:
            self.state[0] += 1
            return x * self.state[0]

    with pytest.raises(CaptureError, match="the traced graph is not the model"):
        capture(Alternating().eval(), (X,))
