"""How instruments are called: like a stack, to the end, whatever one of them raises."""

import pytest
import torch
from torch import nn

from planish.ir import Program, capture
from planish.ir.errors import PassError, VerificationError
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.pipeline import Instrument, Run, Step, run_pipeline
from planish.passes.recipe import Recipe
from tests.support.example_passes import Everything, calling


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(nn.ReLU().eval(), (torch.randn(3, 4),))


def run(program: Program, *passes: Pass, instruments: list[Instrument]) -> Run:
    return run_pipeline(program, Recipe(passes), None, instruments)


class Log(Instrument):
    """Writes down every call, and raises where it is told to."""

    def __init__(self, name: str, log: list[str], fail: str = ""):
        self.name = name
        self.log = log
        self.fail = fail

    def _say(self, hook: str) -> None:
        self.log.append(f"{self.name}.{hook}")
        if hook == self.fail:
            raise VerificationError(f"{self.name} raised")

    def before_pipeline(self, run: Run) -> None:
        self._say("before_pipeline")

    def should_run(self, step: Step) -> bool:
        self._say("should_run")
        return True

    def before_pass(self, step: Step) -> None:
        assert step.before is not None
        assert step.after is None
        self._say("before_pass")

    def after_pass(self, step: Step, result: PassResult) -> None:
        assert step.after is result.program
        self._say("after_pass")

    def after_failure(self, step: Step, error: BaseException) -> None:
        self._say("after_failure")

    def after_pipeline(self, run: Run) -> None:
        self._say("after_pipeline")


def test_instruments_are_called_like_a_stack(program: Program) -> None:
    log: list[str] = []
    run(program, Everything(), instruments=[Log("a", log), Log("b", log)])
    assert log == [
        "a.before_pipeline",
        "b.before_pipeline",
        "a.should_run",
        "b.should_run",
        "a.before_pass",
        "b.before_pass",
        "b.after_pass",
        "a.after_pass",
        "b.after_pipeline",
        "a.after_pipeline",
    ]


@pytest.mark.parametrize(
    ("fails", "end"),
    [
        (("", "after_pass", ""), ["c.after_pass", "b.after_pass", "a.after_failure"]),
        (("", "before_pass", ""), ["b.before_pass", "a.after_failure"]),
        (("", "should_run", ""), ["a.should_run", "b.should_run"]),
    ],
)
def test_an_instrument_that_raises_stops_the_run_and_the_others_are_told(
    program: Program, fails: tuple[str, ...], end: list[str]
) -> None:
    log: list[str] = []
    found: list[Instrument] = [Log("abc"[i], log, fail) for i, fail in enumerate(fails)]
    with pytest.raises(VerificationError, match="b raised"):
        run(program, Everything(), Everything(), instruments=found)
    tail = ["c.after_pipeline", "b.after_pipeline", "a.after_pipeline"]
    assert log[-len(end) - 3 :] == [*end, *tail]


def test_an_instrument_whose_beginning_failed_is_not_told_of_the_end(program: Program) -> None:
    log: list[str] = []
    with pytest.raises(VerificationError, match=r"^b raised"):
        run(program, instruments=[Log("a", log), Log("b", log, "before_pipeline")])
    assert log == ["a.before_pipeline", "b.before_pipeline", "a.after_pipeline"]


def test_an_error_while_handling_an_error_is_a_note_on_the_first(program: Program) -> None:
    log: list[str] = []

    def fail(p: Program, context: PassContext) -> PassResult:
        raise ValueError("first")

    with pytest.raises(PassError, match="first") as caught:
        run(program, calling(fail), instruments=[Log("a", log, "after_failure")])
    assert caught.value.__notes__ == ["besides, Log failed: VerificationError: a raised"]
    assert log[-1] == "a.after_pipeline"


def test_an_error_at_the_end_is_raised_after_all_were_told(program: Program) -> None:
    log: list[str] = []
    found: list[Instrument] = [Log("a", log, "after_pipeline"), Log("b", log, "after_pipeline")]
    with pytest.raises(VerificationError, match="b raised") as caught:
        run(program, instruments=found)
    assert log[-2:] == ["b.after_pipeline", "a.after_pipeline"]
    assert "a raised" in caught.value.__notes__[0]


def test_an_interrupt_is_told_to_the_instruments_and_goes_on(program: Program) -> None:
    log: list[str] = []

    def interrupt(p: Program, context: PassContext) -> PassResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(program, calling(interrupt), instruments=[Log("a", log)])
    assert log[-2:] == ["a.after_failure", "a.after_pipeline"]
