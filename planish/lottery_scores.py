"""Scores of ``sparsify`` for ``find_ticket``: rank weights by more than their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import RequirementError, UsageError
from planish.lottery import Scorer
from planish.passes.base import Fact, PassContext
from planish.passes.calibrate import spool
from planish.passes.sparsify.methods import Score
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import find_sites
from planish.passes.sparsify.sparsify import Sparsify
from planish.passes.sparsify.weight_scores import weight_scores


def scorer(
    score: str | Sparsify,
    example_inputs: tuple[Any, ...],
    *,
    calibration: Iterable[Any] | None = None,
    labeled: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 - exactly as torch.export takes it
) -> Scorer:
    """A ``score`` for ``find_ticket``: it captures the trained model and judges its weights.

    ``find_ticket`` ranks all layers together. Scores of the loss (fisher, woodfisher, undecayed)
    and magnitudes can be compared so; those of a layer's outputs (wanda, obc, sparsegpt) are what
    their names say, but not on one scale.

    Args:
        score: a name such as "woodfisher", or a ``Sparsify`` for its options; its pattern, ratio,
            scope and steps have no meaning here, since ``find_ticket`` prunes by itself.
        example_inputs: positional inputs to capture the model with.
        calibration: a re-iterable of inputs, for wanda, obc and sparsegpt.
        labeled: a re-iterable of labeled batches, for fisher, woodfisher and undecayed.
        loss: ``loss(outputs, batch)``, a scalar tensor, for these.
        dynamic_shapes: of the inputs, where batches are of other sizes than the example.

    Raises:
        UsageError: there is no score of this name.
        RequirementError: the score reads what was not given.
    """
    if isinstance(score, str):
        if score not in get_args(Score):
            raise UsageError(
                f"there is no score {score!r}", hint="use one of: " + ", ".join(get_args(Score))
            )
        score = Sparsify(score=score, pattern="unstructured")  # type: ignore[arg-type]  # checked
    pass_ = replace(score, pattern="unstructured")
    given = {Fact.CALIBRATED: calibration, Fact.LABELS: labeled, Fact.LOSS: loss}
    missing = [fact for fact in Fact if fact in pass_.needs() and given[fact] is None]
    if missing:
        raise RequirementError(
            f"score {pass_.score} requires " + " and ".join(f.name.lower() for f in missing),
            hint="; ".join(fact.value for fact in missing),
        )

    def judge(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
        found, _ = find_sites(program, Pattern.parse(pass_.pattern), pass_.where, tied=True)
        names = _constants(model, masks, {site.name for site in found})
        wanted = set(names.values())
        context = PassContext(labeled=labeled, loss=loss)
        if Fact.CALIBRATED in pass_.needs():
            assert calibration is not None
            context.calibration = spool(calibration, program)
        try:
            scores = weight_scores(
                program,
                [site for site in found if site.name in wanted],
                context,
                pass_.how(),
                alive={names[name]: mask for name, mask in masks.items()},
                padding_mask=pass_.padding_mask,
            )
        finally:
            if context.calibration is not None:
                context.calibration.close()
        return {name: scores[constant] for name, constant in names.items()}

    return judge


def _constants(model: nn.Module, masks: Iterable[str], known: set[str]) -> dict[str, str]:
    """The constant that each masked parameter has become, under whichever of its names.

    Raises:
        UsageError: no linear or convolution of the captured program reads it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in masks:
        names = [n for n, p in parameters.items() if p is parameters[name] and n in known]
        if not names:
            raise UsageError(
                f"{name} has no score: no linear or convolution of the captured model reads it",
                hint=f"leave it out: dense=({name!r},)",
            )
        found[name] = names[0]
    return found


__all__ = ["scorer"]
