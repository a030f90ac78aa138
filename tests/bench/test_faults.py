"""Wrong rewrites are caught at the guilty pass, found by bisect, and replay elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from planish.ir.capture import capture
from planish.ir.errors import PlanishError, RecipeError, UsageError
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import Pass, PassContext
from planish.passes.debug.bisect import bisect
from planish.passes.debug.predicates import KeepsContract
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.faults import FAULTS, Fault, Planted
from planish.tools.bench.faults.__main__ import main
from planish.tools.bench.faults.evidence import bisected, replayed
from planish.tools.bench.faults.models import Clean, clean_run, protected
from planish.tools.bench.faults.planted import MARK
from planish.tools.bench.faults.sabotage import drop, in_call, in_constant, put, swap
from planish.tools.bench.faults.spec import KINDS, NotPlantedError
from planish.tools.bench.faults.table import holds, spread
from planish.tools.bench.faults.trial import attempt
from planish.tools.bench.real_models import REAL_MODELS
from planish.tools.bench.zoo import zoo
from tests.support.real_models import loaded
from tests.support.tiny import conv_bn

SITE = "batch-norm-into-producer@batch_norm"
CAUGHT = tuple(fault for fault in FAULTS.values() if not fault.silent)
SILENT = tuple(fault for fault in FAULTS.values() if fault.silent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where captured programs are kept."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the table keep programs there, too."""
    monkeypatch.setattr("planish.tools.bench.faults.table.cache_dir", lambda: folder)


@pytest.fixture(scope="module")
def tiny() -> Program:
    """A convolution, a batch norm, a relu, a dropout."""
    model, args, shapes = conv_bn()
    return capture(model, args, dynamic_shapes=shapes)


def planted(fault: str, inner: str = "fold-batch-norm", site: str = SITE) -> Planted:
    return Planted(inner=inner, fault=fault, site=site)


def recipe(pass_: Pass) -> Recipe:
    """The exact recipe with one pass replaced."""
    exact = Recipe.parse("exact")
    at = [step.name for step in exact.passes].index("fold-batch-norm")
    return Recipe((*exact.passes[:at], pass_, *exact.passes[at + 1 :]))


def clean(program: Program) -> Clean:
    return clean_run(program, "exact")


# -- the catalogue --------------------------------------------------------------------------------


def test_the_catalogue_is_as_large_and_as_mixed_as_it_claims() -> None:
    assert len(FAULTS) >= 60
    assert {fault.kind for fault in FAULTS.values()} == KINDS
    assert all(name == fault.name for name, fault in FAULTS.items())
    assert len({fault.inner for fault in FAULTS.values()}) >= 15


def test_what_may_pass_silently_has_a_reason_and_is_rare() -> None:
    assert all(len(fault.silent) > 40 for fault in SILENT)
    assert len(SILENT) <= 0.05 * len(FAULTS)


def test_faults_are_planted_in_real_models_only() -> None:
    pretrained = {model.id for model in REAL_MODELS}
    published = {entry.name for entry in zoo() if entry.family != "small"}
    assert {fault.model for fault in FAULTS.values()} <= pretrained | published
    assert sum(fault.model in pretrained for fault in FAULTS.values()) >= 60


def test_a_fault_without_a_hook_or_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="0 hooks"):
        Fault(name="x", kind="wrong axis", model="m", inner="i", rule="r")
    with pytest.raises(ValueError, match="no known kind"):
        Fault(name="x", kind="?", model="m", inner="i", rule="r", at_close=lambda plant: None)
    with pytest.raises(ValueError, match="1 hooks"):
        Fault(name="x", kind="wrong axis", model="m", inner="i", rule="r", extra=drop())


# -- the planted pass -----------------------------------------------------------------------------


def test_a_planted_pass_is_written_in_a_recipe_and_read_back() -> None:
    pass_ = planted("batch-norm-without-mean")
    both = Recipe((pass_,))
    assert str(both).startswith("planish.tools.bench.faults.planted:Planted{")
    assert Recipe.parse(str(both)).passes == (pass_,)
    assert Recipe.from_yaml(both.to_yaml()).passes == (pass_,)


def test_an_unknown_fault_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'batch-norm-without-mean'"):
        planted("batch-norm-without-meen")
    with pytest.raises(RecipeError, match="is not one pass"):
        planted("batch-norm-without-mean", inner="exact")


def test_away_from_its_site_a_planted_pass_is_the_real_one(tiny: Program) -> None:
    for at, step in enumerate(Recipe.parse("exact").passes):
        program = clean(tiny).before[at + 1]
        copy = planted("batch-norm-without-mean", inner=step.name, site="no-rule@nowhere")
        ours = copy.run(program.clone(), PassContext())
        real = step.run(program.clone(), PassContext())
        assert text(ours.program) == text(real.program)
        assert (ours.changes, ours.refusals) == (real.changes, real.refusals)


def test_it_says_where_it_was_planted(tiny: Program) -> None:
    run = run_pipeline(tiny, recipe(planted("batch-norm-without-mean")))
    (record,) = [record for record in run.records if record.name == "planted"]
    (change,) = record.changes
    assert f"{MARK}batch-norm-without-mean at site {change.number}: {SITE}" in record.remarks
    assert change.detail == "planted batch-norm-without-mean"
    assert (change.rule, change.node) == tuple(SITE.split("@"))


def test_a_denied_site_is_not_spoiled(tiny: Program) -> None:
    context = PassContext()
    context.sites.excluded = frozenset({SITE})
    run = run_pipeline(
        tiny, recipe(planted("batch-norm-without-mean")), context, default_instruments()
    )
    assert not any(s.startswith(MARK) for record in run.records for s in record.remarks)


def test_a_fault_that_spoils_nothing_is_a_mistake_of_the_catalogue(
    tiny: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = Fault(
        name="batch-norm-without-mean",
        kind="wrong axis",
        model="tiny",
        inner="fold-batch-norm",
        rule="batch-norm-into-producer",
        on_constant=in_constant(torch.neg, ends="no such ending"),
    )
    monkeypatch.setitem(FAULTS, idle.name, idle)
    with pytest.raises(NotPlantedError, match="changed nothing at batch-norm"):
        run_pipeline(tiny, recipe(planted(idle.name)))


def test_a_fault_that_writes_the_same_arguments_is_a_mistake_too(
    tiny: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = replace(
        FAULTS["convolution-padding"],
        on_call=in_call(torch.ops.aten.conv2d.default, edit=put(groups=1)),
    )
    same = replace(idle, on_call=in_call(torch.ops.aten.conv2d.default, edit=swap("bias", "bias")))
    for fault, raised in ((idle, None), (same, "are such already")):
        monkeypatch.setitem(FAULTS, fault.name, fault)
        if raised is None:  # written out, a default argument is another argument
            run_pipeline(tiny, recipe(planted(fault.name)), PassContext(), default_instruments())
        else:
            with pytest.raises(NotPlantedError, match=raised):
                run_pipeline(tiny, recipe(planted(fault.name)))


def test_a_site_that_is_not_there_is_told(tiny: Program) -> None:
    with pytest.raises(UsageError, match="tiny has no site 2"):
        clean(tiny).planted(
            Fault(
                name="x",
                kind="wrong axis",
                model="tiny",
                inner="fold-batch-norm",
                rule="batch-norm-into-producer",
                nth=2,
                at_close=lambda plant: None,
            )
        )


# -- caught, small --------------------------------------------------------------------------------

ON_TINY = (
    "batch-norm-without-mean",
    "batch-norm-variance-for-deviation",
    "batch-norm-mean-not-scaled",
    "batch-norm-bias-dropped",
    "batch-norm-shift-sign",
    "batch-norm-channels-off-by-one",
    "convolution-kernel-transposed",
    "constant-nan",
    "constant-infinite",
    "constant-of-one-element",
    "constant-random",
    "constant-float64",
    "type-of-a-constant",
    "weight-scaled-in-place",
    "weight-scaled-through-numpy",
)


def perturbed(tiny: Program) -> Program:
    """The same with statistics that are not those of a batch norm that never ran."""
    program = protected(tiny)
    torch.manual_seed(1)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and name.startswith("bn."):
            program.constants[name] = torch.rand_like(value) + 0.5
    return program


@pytest.mark.parametrize("name", ON_TINY)
def test_faults_in_a_small_network_are_caught_and_bisected(tiny: Program, name: str) -> None:
    program = perturbed(tiny)
    spoiled = recipe(planted(name))
    with pytest.raises(PlanishError, match="pass planted: "):
        run_pipeline(protected(program), spoiled, PassContext(), default_instruments())
    found = bisect(protected(program), spoiled, KeepsContract())
    assert (found.pass_name, found.rule, found.node) == ("planted", *SITE.split("@"))
    assert all(e.number <= e.budget for e in found.evaluations if e.level in ("pass", "site"))


# -- caught, real ---------------------------------------------------------------------------------

QUICK = (
    "outputs-swapped",
    "output-dropped",
    "output-renamed",
    "samples-dropped",
    "attention-mask-dropped",
    "attention-taken-for-causal",
    "attention-softmax-over-queries",
    "folded-comparison-inverted",
)
PRETRAINED = (
    ("efficientnet-lite0", "batch-norm-default-eps"),
    ("efficientnet-lite0", "convolution-dilation-and-padding"),
    ("minilm", "folded-sequence"),
    ("minilm", "mask-dropped"),
    ("minilm", "linears-of-other-weights-merged"),
)


@pytest.mark.parametrize("name", QUICK)
def test_faults_in_transformers_are_caught_at_the_guilty_pass(name: str, folder: Path) -> None:
    assert attempt(FAULTS[name], folder).where == "guilty pass"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), PRETRAINED)
def test_faults_in_pretrained_models_are_caught(model: str, name: str, folder: Path) -> None:
    loaded(model)
    assert FAULTS[name].model == model
    assert attempt(FAULTS[name], folder).where == "guilty pass"


@pytest.mark.parametrize("name", ["outputs-swapped", "attention-softmax-over-queries"])
def test_bisect_names_the_planted_site(name: str, folder: Path) -> None:
    fault = FAULTS[name]
    found = bisected(fault, attempt(fault, folder), folder)
    assert found.right, found.answer
    assert found.within


def test_a_bundle_replays_in_a_fresh_process_and_is_reduced(folder: Path) -> None:
    found = replayed(FAULTS["attention-softmax-over-queries"], folder, reduce=True)
    assert found.same, found.found
    assert found.removed >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUGHT, ids=lambda fault: str(fault.name))
def test_every_fault_is_caught_at_the_guilty_pass(fault: Fault, folder: Path) -> None:
    if any(model.id == fault.model for model in REAL_MODELS):
        loaded(fault.model)
    trial = attempt(fault, folder)
    assert trial.where == "guilty pass", trial


@pytest.mark.slow
@pytest.mark.parametrize("fault", SILENT, ids=lambda fault: str(fault.name))
def test_what_is_said_to_pass_silently_does(fault: Fault, folder: Path) -> None:
    if any(model.id == fault.model for model in REAL_MODELS):
        loaded(fault.model)
    assert attempt(fault, folder).where == "never"


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
def test_the_table_is_printed_with_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "^output-renamed "]) == 0
    printed = capsys.readouterr().out
    assert "pipeline: signature" in printed
    assert "caught at the guilty pass: 1" in printed


@pytest.mark.usefixtures("table")
def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "^outputs-swapped ", "--json", "--bisect"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["bisected_right"] == 1
    assert found["rows"][0]["trial"]["by"] == "comparison: sample"


def test_no_fault_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such fault"]) == 2
    assert "no fault of the catalogue matches" in capsys.readouterr().err


def test_a_silent_fault_without_a_reason_fails_the_table() -> None:
    sums = {
        "share": 0.99,
        "silent": {"x": ""},
        "caught_against_the_catalogue": [],
        "bisected": 0,
        "bisected_right": 0,
        "bisected_within_the_bound": 0,
        "replayed": 0,
        "replayed_same": 0,
        "reduced_median_share_removed": None,
    }
    assert not holds(sums)
    assert holds(sums | {"silent": {"x": "because"}})
    assert not holds(sums | {"silent": {}, "share": 0.94})
    assert not holds(sums | {"silent": {}, "bisected": 2, "bisected_right": 1})
    assert not holds(sums | {"silent": {}, "replayed": 1})
    assert not holds(sums | {"silent": {}, "reduced_median_share_removed": 0.89})


def test_faults_to_reduce_are_spread() -> None:
    names = spread(CAUGHT, 20)
    assert len(set(names)) == 20
    assert len({FAULTS[name].kind for name in names}) == 20
    assert len({FAULTS[name].model for name in names}) >= 12
    assert names == spread(reversed(CAUGHT), 20)
