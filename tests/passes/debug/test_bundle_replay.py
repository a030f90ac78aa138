"""Replays: of another program, of a part of the recipe, and under the bounds of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.ir.capture import capture
from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import Pass
from planish.passes.debug.bundle import Bundle, failure_of, load_bundle, replay
from planish.passes.debug.bundle_replay import PinnedCompare
from planish.passes.debug.reproduce import Reproduce
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.passes.debug.bundling import deep
from tests.support import failing_passes as failing


@pytest.fixture(scope="module")
def program() -> Program:
    return deep()


def bundled(program: Program, folder: Path, *passes: Pass) -> Bundle:
    compare, verify = default_instruments()
    reproduce = Reproduce(folder, compare=compare)  # type: ignore[arg-type]  # it is CompareEach
    with pytest.raises(PlanishError) as caught:
        run_pipeline(program, Recipe(passes), None, [reproduce, compare, verify])
    assert caught.value.replay is not None
    return load_bundle(caught.value.replay.split()[-1])


def same(bundle: Bundle, program: Program | None = None, **options: Any) -> bool:
    error = replay(bundle, program, **options)
    return error is not None and failure_of(error).signature == bundle.failure.signature


def test_another_program_may_be_replayed(program: Program, tmp_path: Path) -> None:
    bundle = bundled(program, tmp_path, failing.Wrong(how="elsewhere"))
    assert same(bundle)
    smaller = deep(width=2)
    before = text(smaller)
    assert same(bundle, smaller)  # other sizes: it takes its own second probe
    assert text(smaller) == before
    sound = capture(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    assert not same(bundle, sound)


def test_only_the_failing_pass_can_be_replayed(program: Program, tmp_path: Path) -> None:
    bundle = bundled(program, tmp_path, failing.Wrong(), failing.Crash())
    assert same(bundle, only_failing=True)
    softer = capture(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    # There the failing pass meets no activation and stops in another way.
    other = replay(bundle, softer, only_failing=True)
    assert other is not None
    assert failure_of(other).signature == "crash/wrong/StopIteration"


def test_the_pinned_probe_is_the_one_of_the_run(tmp_path: Path) -> None:
    bundle = bundled(deep(), tmp_path, failing.Wrong(how="size"))
    assert bundle.facts.sizes == {"batch": 4}
    compare = PinnedCompare(bundle)
    probe = compare.second(bundle.program)
    assert probe.inputs is not None
    assert bundle.probe is not None
    assert torch.equal(probe.inputs[0], next(iter(bundle.probe))[0])
    assert compare.second(deep(width=2)).inputs is not None  # its own: the pinned does not fit


def test_bounds_for_another_program_are_never_tighter(program: Program, tmp_path: Path) -> None:
    bundle = bundled(program, tmp_path, failing.Wrong())
    bundle.facts = replace(bundle.facts, bounds=(0.25,))
    assert PinnedCompare(bundle).bounds(bundle.program) == (0.25,)
    assert PinnedCompare(bundle).bounds(deep(width=2)) == (0.25,)
    bundle.facts = replace(bundle.facts, bounds=(1e-9,))
    assert PinnedCompare(bundle).bounds(bundle.program) == (1e-9,)
    two = capture(nn.LSTM(2, 2).eval(), (torch.ones(1, 2),))
    assert PinnedCompare(bundle).bounds(two) == (1e-4, 1e-4, 1e-4)
