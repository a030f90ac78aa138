"""Pretrained models for tests, loaded once per session."""

import functools
import os
from typing import Any

import pytest
from torch import nn

from planish.ir.errors import RequirementError
from planish.tools.bench.real_models import RealModel, real_model


@functools.cache
def _load(model_id: str) -> nn.Module:
    return real_model(model_id).load()


def loaded(model_id: str) -> tuple[RealModel, nn.Module]:
    """The description and the network of a pretrained model; the network is shared, so read only.

    Where its packages are absent the test is skipped and says how to get them, except under CI: a
    green run there means that the model was tried.
    """
    description = real_model(model_id)
    try:
        return description, _load(model_id)
    except RequirementError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def inputs(model_id: str, size: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Real ``(args, kwargs)`` of one of the model's two sizes."""
    description = real_model(model_id)
    return description.inputs(*description.sizes[size])
