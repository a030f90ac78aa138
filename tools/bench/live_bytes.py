"""Count the bytes of tensors that are alive, exactly and on any machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches every operator while it is entered; counts memory that operators make.

    Views share their base's memory, which counts once, and what was there before (weights, inputs)
    does not count. Fake tensors have no memory and are left out.

    Attributes:
        now: bytes alive of what was made.
        peak: the most there ever was.
        made: bytes of all that was made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.now = self.peak = self.made = 0
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator gives
        """Run an operator and count what it made."""
        leaves = tree_leaves((args, kwargs))
        given = {_address(t) for t in leaves if _real(t)}
        given |= {s._cdata for s in leaves if isinstance(s, torch.UntypedStorage)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if _real(value) and _address(value) not in given:
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known or not size:
            return
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)
        self._known[address] = weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size


def _real(value: object) -> bool:
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
