"""The programs that faults are planted in, captured once and kept on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from planish.ir.capture import capture
from planish.ir.errors import UsageError
from planish.ir.files import load, save
from planish.ir.program import Program
from planish.ir.symbols import Symbols
from planish.passes.base import PassContext, PassResult
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe, step_text
from planish.passes.steps import Instrument, Run, Step
from planish.tools.bench.faults.planted import Planted
from planish.tools.bench.faults.spec import Fault
from planish.tools.bench.fetch import models_dir
from planish.tools.bench.real_models import REAL_MODELS, real_model

TARGET = "onnx"


def cache_dir() -> Path:
    """``build/faults`` beside ``build/models``."""
    return models_dir().parent / "faults"


def program_of(name: str, folder: Path | None = None) -> Program:
    """The captured program of a pretrained model or an entry of the zoo.

    Args:
        name: as ``real_models.py`` or ``zoo.py`` call it.
        folder: where captured programs are kept; None captures and keeps nothing.
    """
    if folder is None:
        return _captured(name)
    stem = re.sub(r"[^\w.-]", "_", f"{name}-torch-{torch.__version__}")
    path = folder / f"{stem}.pt2"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save(_captured(name), path)
    return load(path)


def _captured(name: str) -> Program:
    if any(model.id == name for model in REAL_MODELS):
        model = real_model(name)
        args, kwargs = model.inputs(*model.sizes[0])
        return capture(model.load(), args, kwargs, dynamic_shapes=model.dynamic_shapes)
    from planish.tools.bench.zoo import entry

    found = entry(name)
    args, kwargs = found.inputs()
    return capture(found.build(), args, kwargs, dynamic_shapes=found.dynamic_shapes)


class _Keep(Instrument):
    """Keeps the program before every step."""

    def __init__(self) -> None:
        self.before: dict[int, Program] = {}

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Take it."""
        assert step.before is not None
        self.before[step.index] = step.before


@dataclass(frozen=True)
class Clean:
    """A run of a recipe without any fault, which says where faults can be planted.

    Attributes:
        program: the captured one.
        recipe: what ran.
        run: the run, in which verification found nothing.
        before: the program before each step, by its number.
        symbols: what was known of the dynamic sizes. All versions of a program share them, and a
            fault may fix one.
    """

    program: Program
    recipe: Recipe
    run: Run
    before: Mapping[int, Program]
    symbols: Symbols

    def planted(self, fault: Fault) -> tuple[int, Recipe]:
        """The number of the guilty step, from 1, and the recipe with the fault in it.

        Raises:
            UsageError: the model has no such site.
        """
        for record, pass_ in zip(self.run.records, self.recipe.passes, strict=True):
            if step_text(pass_, record.index) != fault.inner:
                continue
            if fault.candidates is not None:
                nodes = [n.name for n in fault.candidates(self.before[record.index])]
            else:
                nodes = [c.node for c in record.changes if c.rule == fault.rule]
            nodes = [name for name in nodes if name.startswith(fault.at)]
            if len(nodes) < fault.nth:
                continue
            site = f"{fault.rule}@{nodes[fault.nth - 1]}"
            copy = Planted(inner=fault.inner, fault=fault.name, site=site)
            at = record.index - 1
            passes = (*self.recipe.passes[:at], copy, *self.recipe.passes[at + 1 :])
            return record.index, replace(self.recipe, passes=passes)
        raise UsageError(f"{fault.model} has no site {fault.nth} of {fault.rule} for {fault.name}")


def clean_run(program: Program, recipe: str) -> Clean:
    """Run a recipe under the default verification.

    Raises:
        VerificationError: a false alarm.
    """
    symbols, keep, parsed = Symbols(program), _Keep(), Recipe.parse(recipe)
    run = run_pipeline(program, parsed, PassContext(target=TARGET), (keep, *default_instruments()))
    return Clean(program, parsed, run, keep.before, symbols)


@lru_cache(maxsize=2)  # programs are large; faults come model by model
def cached_run(name: str, recipe: str, folder: Path | None) -> Clean:
    """``clean_run`` of a model, kept for the faults that follow."""
    return clean_run(program_of(name, folder), recipe)


def protected(program: Program) -> Program:
    """A copy whose tensors are its own, for a fault that writes into them."""
    copy = program.clone()
    copies: dict[int, Tensor] = {}
    for name, value in copy.constants.items():
        if isinstance(value, Tensor):
            copy.constants[name] = copies.setdefault(id(value), value.clone())
    copy.samples = tuple(
        tuple(v.clone() if isinstance(v, Tensor) else v for v in sample) for sample in copy.samples
    )
    return copy
