"""A value's whole life: where it came from, what was done to it and by whom, what it became."""

import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir import Program, capture, text
from planish.ir.errors import UsageError, VerificationError
from planish.ir.pattern import Refusal
from planish.ir.rewriter import Rewriter
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.checking import CompareEach
from planish.passes.debug.life import Life, explain
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.support.example_passes import Everything, RoundWeights, SwapActivation, calling
from tests.support.real_models import inputs, loaded

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.linear(x)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(3, 4),))


def lived(program: Program, *passes: Pass) -> Life:
    life = Life()
    run_pipeline(program, Recipe(passes), None, [life])
    return life


def recipe(text: str) -> tuple[Pass, ...]:
    return Recipe.parse(text).passes


def assert_told(life: Life, name: str, expected: str) -> None:
    """Compare the text, without the path of this file and the digests of values."""
    lines = []
    for line in life.explain(name).text().splitlines():
        head, separator, _ = line.partition(" = ")
        line = head + " = (digest)" if separator and "const @" in head else line
        lines.append(line[: len(line) - len(line.lstrip())] + line.lstrip().split(".py:")[-1])
    assert "\n".join(lines) + "\n" == textwrap.dedent(expected).lstrip("\n")


def test_a_value_that_was_replaced_is_followed_to_the_end(program: Program) -> None:
    life = lived(program, *recipe("remove-identities"), SwapActivation())
    expected = """
        relu
        capture
          relu
            %1: f32[3, 4] = aten.relu(%0)
            33: return self.drop(torch.relu(self.linear(x)))
            module (the model) (Net)
          dropout
            %2: f32[3, 4] = aten.dropout(%1, p=0.5, train=False)
            33: return self.drop(torch.relu(self.linear(x)))
            module drop (Dropout)
        step 1, remove-identities
          1 DropIdentity at dropout: replaced dropout by relu
            - %2: f32[3, 4] = aten.dropout(%1, p=0.5, train=False)
            + %1: f32[3, 4] = aten.relu(%0)
        step 2, swap-activation
          2 relu-to-clamp at relu: made clamp_min_default from relu, in place of relu
            - %1: f32[3, 4] = aten.relu(%0)
            + %1: f32[3, 4] = aten.clamp_min(%0, min=0)
        the result
          relu is gone; clamp_min_default stands for it
          %1: f32[3, 4] = aten.clamp_min(%0, min=0)
          read by return
        """
    assert_told(life, "relu", expected)
    story = life.explain("dropout")
    assert story.now == (("clamp_min_default", "%1: f32[3, 4] = aten.clamp_min(%0, min=0)"),)
    assert story.same_value
    assert not story.alive


def test_numbers_are_of_the_result_unless_a_step_is_named(program: Program) -> None:
    life = lived(program, *recipe("remove-identities"), SwapActivation())
    names = {asked: life.explain(asked).name for asked in ("%1", "%1@1", "%1@0", "%2@0", "%x")}
    assert names == {
        "%1": "clamp_min_default",
        "%1@1": "relu",
        "%1@0": "relu",
        "%2@0": "dropout",
        "%x": "x",
    }
    assert life.explain("%1").others == ("%1@0",)
    assert "%1 was also another value: ask for %1@0" in life.explain("%1").text()
    assert life.explain("%0").others == ()


def test_a_constant_of_other_values_is_told_at_itself_and_its_readers(program: Program) -> None:
    life = lived(program, Everything(), RoundWeights(step=0.5))
    expected = """
        @linear.weight
        capture
          @linear.weight
            const @linear.weight: f32[4, 4] = (digest)
        step 2, round-weights
          1 round at p_linear_weight: edited @linear.weight
            - const @linear.weight: f32[4, 4] = (digest)
            + const @linear.weight: f32[4, 4] = (digest)
        the result
          const @linear.weight: f32[4, 4] = (digest)
          read by linear
        """
    assert_told(life, "@linear.weight", expected)
    (event,) = [e for e in life.explain("@linear.weight").events if e.kind == "edited"]
    assert event.before[0] != event.after
    (event,) = [e for e in life.explain("linear").events if e.kind == "revalued"]
    assert (event.step, event.number, event.sources) == (2, 1, ("@linear.weight",))


class ConvBn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1, bias=False)
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_a_fused_node_is_told_from_what_and_with_its_constants() -> None:
    torch.manual_seed(0)
    life = lived(capture(ConvBn().eval(), (torch.ones(1, 2, 3),)), *recipe("fold-batch-norm"))
    made = [e for e in life.explain("%0").events if e.step == 1]
    told = {(e.kind, e.about, e.sources, e.replaces, e.number) for e in made}
    both = ("conv1d", "batch_norm")
    assert ("made", "conv1d_default", both, both, 1) in told
    assert {about for kind, about, *_ in told if kind == "edited"} == {"@conv.weight"}
    assert {about for kind, about, *_ in told if kind == "made"} == {"conv1d_default", "@conv.bias"}
    story = life.explain("@bn.running_var")
    assert not story.same_value
    assert [name for name, _ in story.now] == ["conv1d_default"]
    assert "@bn.running_var is gone; conv1d_default took it in" in story.text()


def test_what_nobody_read_is_gone_for_good() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.tanh(x)
            return torch.relu(x)

    life = lived(capture(Dead().eval(), (torch.ones(2),)), *recipe("eliminate-dead-code"))
    story = life.explain("tanh")
    assert (story.now, story.alive) == ((), False)
    assert story.text().splitlines()[-3:] == [
        "    - %0: f32[2] = aten.tanh(%x)",
        "the result",
        "  tanh is gone, and nothing stands for it",
    ]


def test_who_declined_is_told_with_the_reason_and_only_of_the_value(program: Program) -> None:
    def decline(p: Program, context: PassContext) -> PassResult:
        refusals = (
            Refusal("too-small", "relu", "it has 12 elements"),
            Refusal("too-flat", "linear", "it has 2 dimensions"),
        )
        return PassResult(p, (), refusals)

    life = lived(program, calling(decline, name="tile"), SwapActivation())
    expected = """
        relu
        capture
          relu
            %1: f32[3, 4] = aten.relu(%0)
            33: return self.drop(torch.relu(self.linear(x)))
            module (the model) (Net)
        step 1, tile
          too-small declined at relu: it has 12 elements
        step 2, swap-activation
          1 relu-to-clamp at relu: made clamp_min_default from relu, in place of relu
            - %1: f32[3, 4] = aten.relu(%0)
            + %1: f32[3, 4] = aten.clamp_min(%0, min=0)
        the result
          relu is gone; clamp_min_default stands for it
          %1: f32[3, 4] = aten.clamp_min(%0, min=0)
          read by dropout
        """
    assert_told(life, "relu", expected)
    (declined,) = [e for e in life.explain("linear").events if e.kind == "declined"]
    assert (declined.rule, declined.text) == ("too-flat", "it has 2 dimensions")


def test_readers_tell_what_they_read_before(program: Program) -> None:
    life = lived(program, SwapActivation())
    (event,) = [e for e in life.explain("dropout").events if e.step == 1]
    assert (event.kind, event.number, event.rule) == ("rewired", 1, "relu-to-clamp")


def test_a_name_that_is_given_again_is_another_value(program: Program) -> None:
    def back(p: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(p, "back", context.sites)
        (node,) = [n for n in p.operators if n.target is aten.clamp_min.default]
        with rewriter.site("clamp-to-relu", node):
            rewriter.replace(node, rewriter.call(aten.relu.default, node.args[:1], like=node))
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    again = calling(back, name="back")
    life = lived(program, SwapActivation(), again, SwapActivation(), again)
    first, last = life.explain("clamp_min_default@1"), life.explain("clamp_min_default@3")
    assert {e.step for e in first.events if e.about == "clamp_min_default" and e.kind == "made"} > {
        1
    }
    assert first.others == ("clamp_min_default@3",)
    assert last.others == ("clamp_min_default@1",)
    assert first.now == last.now == (("relu_default", "%1: f32[3, 4] = aten.relu(%0)"),)
    assert life.explain("clamp_min_default").events == last.events
    with pytest.raises(UsageError, match="was not there then") as caught:
        life.explain("clamp_min_default@2")
    assert caught.value.hint == (
        "clamp_min_default was there from step 1 until step 2, from step 3 until step 4"
    )


def test_what_is_edited_without_the_rewriter_is_told_too(program: Program) -> None:
    def behind(p: Program, context: PassContext) -> PassResult:
        (relu,) = [n for n in p.operators if n.target is aten.relu.default]
        relu.target = aten.tanh.default
        return PassResult(p)

    life = lived(program, calling(behind))
    (event,) = [e for e in life.explain("relu").events if e.step == 1]
    assert event.kind in ("rewired", "retyped", "edited")
    assert event.before == ("%1: f32[3, 4] = aten.relu(%0)",)
    assert event.after == "%1: f32[3, 4] = aten.tanh(%0)"


@pytest.mark.parametrize(
    ("asked", "what", "hint"),
    [
        ("rely", "there is and was nothing called 'rely'", "did you mean relu"),
        ("@liner.weight", "nothing called", "did you mean @linear.weight"),
        ("%y", "nothing called '%y'", "did you mean %x"),
        ("%7", "the program's text has no '%7'", "that text has %0 to %2; %N@0 means"),
        ("%2@5", "'%2@5' asks for step 5", "the recipe has 1 steps"),
        ("relu@1", "'relu@1' was not there then", "relu was there from step 0 until step 1"),
    ],
)
def test_what_never_was_is_refused(program: Program, asked: str, what: str, hint: str) -> None:
    life = lived(program, SwapActivation())
    with pytest.raises(UsageError, match=what) as caught:
        explain(life, asked)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_a_rejected_rewrite_is_told(program: Program) -> None:
    life = Life()
    passes = Recipe((Everything(), SwapActivation(to="gelu")))
    with pytest.raises(VerificationError):
        run_pipeline(program, passes, None, [life, CompareEach()])
    story = life.explain("relu")
    assert story.end == "after step 2, swap-activation, which failed"
    assert story.now == (("gelu_default", "%1: f32[3, 4] = aten.gelu(%0)"),)


def test_plain_data_holds_what_the_text_does(program: Program) -> None:
    life = lived(program, SwapActivation())
    facts = life.explain("relu").to_dict()
    made = facts["events"][-2:]
    assert {e["kind"] for e in made} == {"made", "replaced"}
    assert {e["type"] for e in made if e["kind"] == "made"} == {"f32[3, 4]"}
    now = {"name": "clamp_min_default", "line": "%1: f32[3, 4] = aten.clamp_min(%0, min=0)"}
    assert (facts["now"], facts["readers"]) == ([now], ["dropout"])


def test_every_value_of_a_real_model_has_a_story_that_ends_in_the_result() -> None:
    _, model = loaded("minilm")
    life = Life()
    example: Any = inputs("minilm")
    result = planish.optimize(model, example, instruments=[life], verify="off")
    captured = planish.optimize(model, example, recipe="none", verify="off").program
    lines = set(text(result.program, values=True).splitlines())
    for node in (*captured.operators, *result.program.operators):
        story = life.explain(node.name)
        assert story.now, f"{node.name} was read by something"
        operators = [line for name, line in story.now if not name.startswith("@")]
        assert {"  " + line for line in operators} <= lines
        assert story.events[0].kind == "captured"
        assert story.alive == (story.now[0][0] == node.name)
