"""Hold weights at zero while somebody else's loop trains a model.

The loop may use any ``torch.optim`` optimizer with momentum, weight decay or moments: gradients are
masked as they arrive, and after every step the weights and the optimizer's state are masked again.
What changes weights in another way is caught at the end, since no mask may fail unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from planish.ir.errors import UsageError, VerificationError


def prunable(model: nn.Module, dense: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """The weights of linears and convolutions by name; a shared one once, under its first name.

    Args:
        model: where to look.
        dense: modules, or parameters, that are left out.

    Raises:
        UsageError: a name in ``dense`` is none of the model's.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name in dense:
        if name not in modules and name not in parameters:
            raise UsageError(f"the model has no module or parameter {name!r} to leave dense")
    weights = {
        id(m.weight): m.weight
        for m in modules.values()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
        and isinstance(m.weight, nn.Parameter)
    }
    return {
        name: parameter
        for name, parameter in parameters.items()
        if id(parameter) in weights and not any(_within(name, d) for d in dense)
    }


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks leave out to zero.

    Raises:
        UsageError: a mask is of no parameter, of another shape, or not bool.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise UsageError(
                    f"the mask of {name!r} is {mask.dtype}, not bool", hint="mask != 0"
                )
            if name not in parameters or parameters[name].shape != mask.shape:
                raise UsageError(f"a mask {list(mask.shape)} is given for {name!r}, which is "
                                 + ("none of the parameters" if name not in parameters else
                                    f"{list(parameters[name].shape)}"))  # fmt: skip
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Train a model inside of this: weights that a mask leaves out are zero from the first step on.

    Args:
        model: its weights are set to zero at once.
        masks: by name of parameter, bool, True for what may be nonzero.

    Raises:
        UsageError: a mask fits no parameter.
        VerificationError: at the end a weight is not zero, since something other than a step of an
            optimizer has written it.
    """
    apply_masks(model, masks)
    parameters = dict(model.named_parameters())
    gone = {parameters[n]: ~mask.to(parameters[n].device) for n, mask in masks.items()}
    handles: list[Any] = [
        parameter.register_hook(lambda g, out=out: g.masked_fill(out, 0))
        for parameter, out in gone.items()
        if parameter.requires_grad
    ]

    def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in gone:
                        _clear(parameter, gone[parameter], optimizer.state.get(parameter, {}))

    handles.append(register_optimizer_step_post_hook(after_step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    now = dict(model.named_parameters())
    for name, mask in masks.items():
        revived = int((now[name][~mask.to(now[name].device)] != 0).sum())
        if revived:
            raise VerificationError(
                f"training brought back {revived} weights of {name} that are masked",
                hint="weights must change by steps of torch.optim optimizers alone",
            )


def _clear(parameter: Tensor, out: Tensor, state: Mapping[str, Any]) -> None:
    parameter.masked_fill_(out, 0)
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == out.shape:
            value.masked_fill_(out, 0)
