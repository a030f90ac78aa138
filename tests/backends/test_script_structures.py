"""What goes into a TorchScript file and comes out of it: structures, names, constants, memory."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from tests.support.script_files import agrees, answers_of, module, written

X = torch.linspace(-1, 2, 12).reshape(3, 4)
Out = namedtuple("Out", ["a", "b"])
Tensor_ = namedtuple("Tensor", ["a"])  # type: ignore[name-match]
_Hidden = namedtuple("_Hidden", ["first", "second"])


@dataclass
class Reply:
    logits: Tensor
    hidden: Any = None


pytree.register_dataclass(Reply)

OUTPUTS = {
    "none": lambda self, x: (x + 1, None),
    "fields with none": lambda self, x: {"a": x + 1, "b": None},
    "nested": lambda self, x: {"a": {"b": x + 1, "c": (x, x * 2)}, "d": [x]},
    "keys that are no names": lambda self, x: {"a b": x + 1, 'it\'s "q"': (x, x)},
    "numbers as keys": lambda self, x: {0: x + 1, 1: (x, x)},
    "a keyword as key": lambda self, x: {"class": x + 1, "def": (x,)},
    "methods of tuples as keys": lambda self, x: {"count": x + 1, "index": (x,)},
    "empty": lambda self, x: ((), {}, [], x + 1),
    "lists in lists": lambda self, x: [[x + 1], [x * 2]],
    "mixed list": lambda self, x: [x + 1, (x, None)],
    "one": lambda self, x: (x + 1,),
    "named": lambda self, x: Out(x + 1, (x, x)),
    "named as the compiler's types": lambda self, x: (Tensor_(x + 1), x),
    "private class": lambda self, x: _Hidden(x + 1, x),
    "data": lambda self, x: Reply(x + 1, {"h": x}),
    "data with none": lambda self, x: Reply(x + 1),
    "numbers": lambda self, x: (x + 1, 3, 2.5, True, 'a "b"\n\té'),
    "an input": lambda self, x: (x, x + 1),
    "one twice": lambda self, x: (lambda y: (y, y))(x + 1),
    "a scalar": lambda self, x: x.sum(),
    "no elements": lambda self, x: x[:0] + 1,
}


@pytest.mark.parametrize("style", OUTPUTS)
def test_outputs_of_any_structure(style: str, tmp_path: Path) -> None:
    agrees(module(OUTPUTS[style]), tmp_path / "model.pt", (X,))


def test_outputs_of_transformers(tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def forward(self: nn.Module, x: Tensor) -> Any:
        return outputs.BaseModelOutputWithPooling(last_hidden_state=x + 1, hidden_states=(x, x * 2))

    result = agrees(module(forward), tmp_path / "model.pt", (X,))
    found = torch.jit.load(str(tmp_path / "model.pt"))(X)
    assert torch.equal(found.last_hidden_state, X + 1)
    assert any("named tuple of the same fields" in text for text in result.report.remarks)


def test_an_input_called_like_the_class_of_the_output(tmp_path: Path) -> None:
    pair = Out

    def forward(self: nn.Module, Out: Tensor) -> Any:
        return pair(Out + 1, (Out, Out))

    agrees(module(forward), tmp_path / "model.pt", (X,))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert type(loaded(Out=X)).__name__ == "Out_1"


def test_one_process_writes_many_files_with_outputs_of_one_name(tmp_path: Path) -> None:
    for fields in (["a"], ["a", "b"], ["b", "a"]):
        kind = namedtuple("Same", fields)  # type: ignore[misc]

        def forward(self: nn.Module, x: Tensor, kind: Any = kind) -> Any:
            return kind(*(x + i for i in range(len(kind._fields))))

        written(module(forward), tmp_path / "model.pt", (X,))
        found = torch.jit.load(str(tmp_path / "model.pt"))(X)
        assert found._fields == tuple(fields)


def test_equal_programs_give_equal_files_within_one_process(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    contents = []
    for _ in range(3):
        written(net, tmp_path / "model.pt", (torch.ones(16, 4),))
        contents.append((tmp_path / "model.pt").read_bytes())
    assert contents[0] == contents[1] == contents[2]


INPUTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lists": (lambda self, xs: xs[0] + xs[1][0]["a"], ([X, ({"a": X}, X)],)),
    "odd keys": (lambda self, d: d["a b"] + d['it\'s "q"'], ({"a b": X, 'it\'s "q"': X},)),
    "numbers as keys": (lambda self, d: d[0] + d[1], ({0: X, 1: X},)),
    "a number within": (lambda self, d: d["x"] * d["n"], ({"x": X, "n": 3},)),
    "none within": (lambda self, d: d["x"] + 1, ({"x": X, "m": None},)),
    "empty ones": (lambda self, x, d, t: x + 1, (X, {}, [])),
    "data": (lambda self, d: d.logits * d.hidden, (Reply(X, X),)),
    "named": (lambda self, p: p.a + p.b, (Out(X, X),)),
    "unused": (lambda self, x, y: x + 1, (X, X)),
    "not finite": (lambda self, x, low, high: x.clamp(low, high), (X, -float("inf"), 0.5)),
    "not a number": (lambda self, x, f: x * f, (X, float("nan"))),
    "text": (lambda self, x, text: x * 2, (X, 'a\nb\\ "é" \x01\x7f {}')),
    "truth": (lambda self, x, flag: x + 1 if flag else x * 2, (X, True)),
    "no elements": (lambda self, x: x.sum(0), (torch.zeros(0, 4),)),
}


@pytest.mark.parametrize("style", INPUTS)
def test_inputs_of_any_structure(style: str, tmp_path: Path) -> None:
    from planish.backends.script_run import ScriptSession

    function, args = INPUTS[style]
    result = written(module(function), tmp_path / "model.pt", args)
    session = ScriptSession(tmp_path / "model.pt")
    flat = result.program.signature.flatten(args, {})
    with torch.no_grad():
        expected = module(function)(*args)
    assert torch.allclose(session.run(flat)[0], expected, equal_nan=True)


def test_constants_of_the_capture_are_defaults_and_nothing_else(tmp_path: Path) -> None:
    def forward(self: nn.Module, x: Tensor, n: int = 2, f: float = 0.1, s: str = "é") -> Tensor:
        return x * n + f

    written(module(forward), tmp_path / "model.pt", (X, 3, float("inf"), "é\n"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert torch.equal(loaded(X), X * 3 + float("inf"))
    assert torch.equal(loaded(X, n=3), loaded(x=X, s="é\n"))
    for wrong in ({"n": 2}, {"f": 1.0}, {"s": "e"}):
        with pytest.raises(torch.jit.Error, match="was the constant"):
            loaded(X, **wrong)


def test_keywords_only(tmp_path: Path) -> None:
    def forward(self: nn.Module, *, b: Tensor, a: Tensor, c: Any = None) -> Tensor:
        return a - 2 * b

    written(module(forward), tmp_path / "model.pt", (), {"a": X, "b": X + 1})
    ((found,),) = answers_of(tmp_path / "model.pt", [((), {"b": X + 1, "a": X})])
    assert torch.equal(found, X - 2 * (X + 1))


_KEPT = ("print", "input", "packed", "forward")
_CHANGED = ("_", "inf", "torch", "Tensor", "float", "int", "math")


@pytest.mark.parametrize("name", [*_KEPT, *_CHANGED])
def test_names_of_inputs(name: str, tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(f"def forward(self, {name}, y): return {name} / {name}.size(0) * y.sqrt()", space)
    result = written(
        module(space["forward"]),
        tmp_path / "model.pt",
        (X, torch.ones(())),
        dynamic_shapes=({0: Dim("b", min=2, max=9)}, None),
    )
    parameter = torch.jit.load(str(tmp_path / "model.pt")).forward.schema.arguments[1].name
    assert (parameter == name) is (name in _KEPT)
    told = f"the argument {name!r} is called {parameter!r}"
    assert any(told in text for text in result.report.remarks) is (name in _CHANGED)


# -- memory -----------------------------------------------------------------------------------


def test_weights_that_are_outputs_are_not_handed_out(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)

    def forward(self: Any, x: Tensor) -> Any:
        return self.layer(x), self.layer.weight, self.layer.weight.t()[0], self.table

    written(
        module(forward, layer=layer, table=torch.ones(2)), tmp_path / "m.pt", (torch.ones(9, 4),)
    )
    loaded = torch.jit.load(str(tmp_path / "m.pt"))
    first = [t.clone() for t in loaded(torch.ones(9, 4))]
    for output in loaded(torch.ones(9, 4)):
        output.zero_()
    assert all(torch.equal(a, b) for a, b in zip(loaded(torch.ones(9, 4)), first, strict=True))


def test_inputs_are_not_written_into(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self: Any, x: Tensor) -> Any:
        return torch.relu(self.conv(x) + x), x.permute(0, 2, 3, 1), x[0]

    x = torch.randn(1, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    written(module(forward, conv=conv), tmp_path / "model.pt", (x,))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    first = loaded(x)
    again = loaded(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    first[0].zero_()
    assert torch.equal(loaded(x)[0], again[0])


def test_calls_of_other_sizes_from_many_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    written(
        net,
        tmp_path / "model.pt",
        (torch.randn(2, 3, 8, 8),),
        dynamic_shapes=({0: Dim("batch", max=16)},),
    )
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    bad: list[int] = []

    def work(batch: int) -> None:
        x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = net(x)
            for _ in range(5):
                if not torch.allclose(loaded(x), expected, atol=1e-5):
                    bad.append(batch)

    threads = [Thread(target=work, args=(batch,)) for batch in (1, 2, 5, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    table = torch.randn(1000, 1000)
    model = module(
        lambda self, x: x + self.few.sum() + self.wide[:3, :4],
        few=table[:2, :2],
        wide=torch.zeros(1, 1).expand(3, 4),
    )
    agrees(model, tmp_path / "model.pt", (X,))
    assert (tmp_path / "model.pt").stat().st_size < 50_000


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    table = nn.Embedding(5000, 16)
    model = module(
        lambda self, i: nn.functional.linear(self.table(i), self.table.weight), table=table
    )
    path = tmp_path / "a name with é.v1.pt"
    agrees(model, path, (torch.arange(32).reshape(2, 16),))
    assert path.stat().st_size < 1.2 * 4 * table.weight.numel()
