"""What low-rank factors and pruned units are worth on MiniLM, alone and before int8.

Every candidate is a recipe; its file runs beside the plain float export in ONNX Runtime, one run of
each in alternation, one thread. Fidelity is that of sentence embeddings on other texts than those
calibrated with.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from planish.ir.errors import PlanishError
from planish.tools.bench.quantization.cases import CASES, Case, Inputs
from planish.tools.bench.quantization.table import BASE, Candidate, Row, Tell, timed_rows

STATIC = "smooth-quant{min_gain_db=6},quantize{range=minmax},correct-bias"
DYNAMIC = "quantize{mode=dynamic}"
_NEURONS = 'where={include=["encoder.layer.[0-5].intermediate"]}'
_FFN = 'where={include=["encoder.layer.[0-5].intermediate","encoder.layer.[0-5].output"]}'
_HEADS = "where={include=[aten.scaled_dot_product_attention]}"
# What each family is asked for: label -> step.
STEPS = {
    "factorize keep=0.7 FFN": f"factorize{{keep=0.7,{_FFN}}}",
    "factorize keep=0.5 FFN": f"factorize{{keep=0.5,{_FFN}}}",
    "factorize keep=0.5 FFN, svd": f"factorize{{method=svd,keep=0.5,{_FFN}}}",
    "factorize macs=0.8": "factorize{rule=macs,keep=0.8}",
    "factorize macs=0.6": "factorize{rule=macs,keep=0.6}",
    "factorize latency=0.8": "factorize{rule=latency,keep=0.8}",
    "factorize heads keep=0.75": f"factorize{{keep=0.75,heads=true,{_HEADS}}}",
    "interpolate keep=0.95 FFN": f"interpolate{{keep=0.95,{_NEURONS}}}",
    "interpolate keep=0.9 FFN": f"interpolate{{keep=0.9,{_NEURONS}}}",
    "interpolate keep=0.8 FFN": f"interpolate{{keep=0.8,{_NEURONS}}}",
    "interpolate keep=0.6 FFN": f"interpolate{{keep=0.6,{_NEURONS}}}",
    "prune magnitude keep=0.9 FFN": f"prune{{score=magnitude,keep=0.9,{_NEURONS}}}",
    "prune fisher keep=0.9 FFN": f"prune{{score=fisher,keep=0.9,{_NEURONS}}}",
    "prune-transformer macs=0.95": "prune-transformer{macs=0.95}",
    "prune-transformer macs=0.9": "prune-transformer{macs=0.9}",
    "prune-transformer macs=0.8": "prune-transformer{macs=0.8}",
    "prune-transformer macs=0.6": "prune-transformer{macs=0.6}",
    "prune-transformer latency=0.7": "prune-transformer{latency=0.7}",
}
# Quantizers that a family is composed with.
AFTER = {"int8-static": STATIC, "int8-dynamic": DYNAMIC}


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        name: for people.
        recipe: as text.
        quantized: a key of AFTER; "" for a float file.
    """

    name: str
    recipe: str
    quantized: str = ""


def entries() -> list[Entry]:
    """Every family alone, int8 alone, and every family before int8."""
    found = [Entry("exact", "exact")]
    found += [Entry(name, f"exact,{after}", name) for name, after in AFTER.items()]
    for label, step in STEPS.items():
        found.append(Entry(label, f"exact,{step}"))
        found += [
            Entry(f"{label}, {name}", f"exact,{step},{after}", name)
            for name, after in AFTER.items()
        ]
    return found


@dataclass
class Setting:
    """The model and all data.

    Attributes:
        case: the model, its data and its judge.
        calibration: batches that passes see.
        labeled: single sentences with labels, see ``labels``.
        rounds: timed runs of each file.
        seed: of the labels.
    """

    case: Case
    calibration: list[Inputs]
    labeled: list[tuple[Inputs, Tensor]]
    rounds: int
    seed: int = 0
    program: Any = field(default=None, repr=False)


def setting(samples: int, rounds: int, seed: int = 0) -> Setting:
    """MiniLM, calibrated with so many sentences.

    Raises:
        RequirementError: the model or the texts are not here.
    """
    from planish.tools.bench.sparsity.__main__ import spread
    from planish.tools.bench.sparsity.runs import captured

    case = next(c for c in CASES if c.name == "minilm")
    calibration = spread(case.calibration(), samples)
    example = tuple(torch.cat([t, t]) for t in case.timed())
    model = case.load()
    program = captured(model, example, case.dynamic_shapes)
    return Setting(case, calibration, labels(model, calibration, seed), rounds, seed, program)


def labels(
    model: torch.nn.Module, batches: Iterable[Inputs], seed: int
) -> list[tuple[Inputs, Tensor]]:
    """Sentences one by one, and for each the model's own embedding plus unit Gaussian noise.

    MiniLM has no labels. The squared distance to its own embeddings has no gradient at the model
    itself, so the labels are drawn from the distribution whose likelihood that distance is: the
    gradients' second moment then is the Fisher information of the embedding.
    """
    made = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for batch in batches:
            for row in zip(*batch, strict=True):
                inputs = _trimmed(tuple(t[None] for t in row))
                wanted = embedding(model(*inputs), inputs[1])
                noise = torch.randn(wanted.shape, generator=made)
                found.append((inputs, wanted + noise))
    return found


def _trimmed(inputs: Inputs) -> Inputs:
    """Without the padding behind."""
    length = int(inputs[1].sum())
    return tuple(t[:, :length] for t in inputs)


def embedding(outputs: Any, mask: Tensor) -> Tensor:  # noqa: ANN401 - whatever the model gives
    """Mean over the tokens that are no padding, of length 1, [sentences, features]."""
    states = pytree.tree_leaves(outputs)[0]
    keep = mask.unsqueeze(-1)
    return F.normalize((states * keep).sum(1) / keep.sum(1), dim=-1)


def distance(outputs: Any, batch: tuple[Inputs, Tensor]) -> Tensor:  # noqa: ANN401 - as above
    """Half the squared distance of the embedding to its label, summed over features."""
    (_, mask), wanted = batch
    return 0.5 * (embedding(outputs, mask) - wanted).square().sum()


def measure(given: Setting, chosen: Sequence[Entry], folder: Path, tell: Tell) -> list[Row]:
    """The plain export first, then a row for every entry; one that fails says why."""
    from planish.tools.bench.export_cost import export_plain

    torch.set_num_threads(1)
    case, timed = given.case, given.case.timed()
    plain = folder / "plain.onnx"
    example = tuple(torch.cat([t, t]) for t in timed)
    export_plain(case.load(), example, {}, case.dynamic_shapes, str(plain))
    made = [_opened(BASE, plain, timed, "")]
    failed: list[Row] = []
    for entry in chosen:
        tell(entry.recipe)
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', entry.name.lower())}.onnx"
        try:
            note = _make(given, entry, path)
            made.append(_opened(entry.name, path, timed, note))
        except PlanishError as error:
            failed.append(Row(entry.name, note=f"failed: {error.what}"))
            tell(f"  failed: {error}")
    tell(f"timing {len(made)} files")
    rows = timed_rows(made, given.rounds)
    held = case.held()
    reference: list[Tensor] = []
    for candidate, row in zip(made, rows, strict=True):
        tell(f"judging {candidate.name}")
        found = candidate.outputs(held)
        reference = reference or found
        row.scores = case.judge(held, reference, found)
    return [*rows, *failed]


def _make(given: Setting, entry: Entry, path: Path) -> str:
    """Write a file; returns what it took."""
    import planish

    began = time.perf_counter()
    optimized = planish.optimize(
        given.program,
        recipe=entry.recipe,
        calibration=given.calibration,
        loss=distance,
        labeled=given.labeled,
        padding_mask=given.case.padding_mask,
        verify="off",
        seed=given.seed,
    )
    optimized.export(path)
    return f"made in {time.perf_counter() - began:.0f} s"


def _opened(name: str, path: Path, timed: Inputs, note: str) -> Candidate:
    from planish.backends.ort_run import Session

    session = Session(path, threads=1)

    def once() -> float:
        began = time.perf_counter()
        session.run(timed)
        return time.perf_counter() - began

    def outputs(held: Sequence[Inputs]) -> list[Tensor]:
        return [torch.from_numpy(session.run(batch)[0]) for batch in held]

    return Candidate(name, path, once, outputs, planish=name != BASE, note=note)


def beyond(rows: Sequence[Row], chosen: Sequence[Entry]) -> list[str]:
    """Names of compositions that are faster than int8 alone and no less faithful.

    Args:
        rows: measured.
        chosen: what they are.
    """
    by_name = {row.name: row for row in rows if row.ratio is not None}
    alone = [by_name[name] for name in AFTER if name in by_name]
    composed = [e.name for e in chosen if e.quantized and e.name not in AFTER]
    return [
        name
        for name in composed
        if name in by_name
        and alone
        and any(_passes(by_name[name], a) for a in alone)
        and not any(_passes(a, by_name[name]) for a in alone)
    ]


def _passes(row: Row, other: Row) -> bool:
    """Whether a row is faster and keeps the cosine of another."""
    assert row.ratio is not None
    assert other.ratio is not None
    return row.ratio > other.ratio and row.scores["cosine"] >= other.scores["cosine"]


def frontier(rows: Sequence[Row]) -> set[str]:
    """Names of rows that no other beats in speed and cosine at once."""
    measured = [row for row in rows if row.ratio is not None and row.scores]
    return {
        row.name
        for row in measured
        if not any(_passes(other, row) for other in measured if other is not row)
    }
