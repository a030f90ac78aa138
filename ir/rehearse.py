"""Run the caller's model without leaving a trace in it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planish.ir.calling import Call

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back what ``forward`` may change in a model: its attributes, and the global generator.

    Attributes are restored by identity, lists, dicts and sets among them by content; tensors among
    them are copies inside. Values of parameters and buffers are not restored: whatever runs inside
    must not write into them.
    """
    saved = [
        (module, dict(vars(module)), [(v, _content(v)) for v in _containers(module)])
        for module in model.modules()
    ]
    copies: dict[int, Tensor] = {}
    try:
        for module, attributes, _ in saved:
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    vars(module)[name] = copies.setdefault(id(value), value.clone())
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, attributes, containers in saved:
            if _differs(vars(module), attributes):
                vars(module).clear()
                vars(module).update(attributes)
            for container, content in containers:
                _restore(container, content)


def _containers(module: nn.Module) -> list[Any]:
    return [v for v in vars(module).values() if isinstance(v, _CONTAINERS)]


def _content(container: Any) -> Any:  # noqa: ANN401 - one of _CONTAINERS
    return list(container.items()) if isinstance(container, dict) else list(container)


def _differs(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() != before.keys() or any(now[name] is not before[name] for name in before)


def _restore(container: Any, content: list[Any]) -> None:  # noqa: ANN401 - one of _CONTAINERS
    now = _content(container)
    if len(now) == len(content) and all(
        _identical(a, b) for a, b in zip(now, content, strict=True)
    ):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _identical(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_identical(x, y) for x, y in zip(a, b, strict=True))
    return a is b


def rehearse(model: nn.Module, call: Call, *, copy_parameters: bool = False) -> Any:  # noqa: ANN401
    """What the model itself returns for a call.

    It works on copies of the inputs, the buffers and other tensors it holds, and of the parameters
    on demand: where it is not known yet whether ``forward`` writes into them.
    """
    with untouched(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Tensor] = dict(model.named_buffers())
        if copy_parameters:
            state.update(model.named_parameters())
        copies = {name: tensor.detach().clone() for name, tensor in state.items()}
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (call.args, call.kwargs))
        return torch.func.functional_call(model, copies, args, kwargs)


def register_dataclasses(value: object) -> bool:
    """Make the dataclasses in a value known to torch's pytrees; returns whether there were any."""
    found = False
    while True:
        unknown = {
            type(leaf)
            for leaf in pytree.tree_leaves(value)
            if is_dataclass(leaf) and not isinstance(leaf, type)
        }
        if not unknown:
            return found
        for cls in unknown:
            torch.export.register_dataclass(cls)
        found = True
