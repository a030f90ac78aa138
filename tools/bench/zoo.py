"""The architectures of the sweep: at least 90, all with seeded random weights, small and quick.

    python -m planish.tools.bench.zoo [REGEX]      # list them

Families: torchvision, timm, transformers (tiny configurations) and ``small`` (hand-written modules
with odd signatures and control flow). Nothing heavy is imported until an entry is built.

Weights that a constructor leaves constant (norm scales of one, biases of zero, batch-norm
statistics, layer scales of 1e-6) are perturbed: a folding that dropped one would go unnoticed.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
DynamicShapes = Mapping[str, Any] | tuple[Any, ...]
SEED = 20


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One architecture of the sweep.

    Attributes:
        name: unique; the family and the model's own name.
        family: torchvision, timm, transformers or small.
        build: makes the module with seeded weights, in eval mode.
        inputs: makes seeded sample inputs, ``(args, kwargs)``.
        dynamic_shapes: as ``torch.export`` takes it, or None for static shapes.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    dynamic_shapes: DynamicShapes | None = None


def seeded(constructor: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Wrap a constructor: seed, build, perturb constant parameters, switch to eval."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = constructor().eval()
            with torch.no_grad():
                _perturb_constants(model)
        return model

    return build


def _perturb_constants(model: nn.Module) -> None:
    for parameter in model.parameters():
        if (
            parameter.is_floating_point()
            and parameter.numel()
            and parameter.min() == parameter.max()
        ):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0.0, 0.1)
            if module.running_var is not None:
                module.running_var.uniform_(0.7, 1.3)


def normal(*shape: int, seed: int = SEED) -> Tensor:
    """Seeded f32 tensor of standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = SEED) -> Tensor:
    """Seeded i64 tensor of numbers in 0..high - 1."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(batch: int, length: int) -> Tensor:
    """i64 [batch, length] of ones, with padding at the end of every row but the first."""
    keep = torch.tensor([max(1, length - 3 * row) for row in range(batch)])
    return (torch.arange(length)[None] < keep[:, None]).to(torch.int64)


def one_tensor(*shape: int) -> Callable[[], Inputs]:
    """Inputs of one normal tensor as the only positional argument."""
    return lambda: ((normal(*shape),), {})


def zoo() -> tuple[ZooEntry, ...]:
    """Every entry, family by family; the names are unique."""
    from planish.tools.bench import zoo_small, zoo_timm, zoo_torchvision, zoo_transformers

    entries = (
        *zoo_small.entries(),
        *zoo_torchvision.entries(),
        *zoo_timm.entries(),
        *zoo_transformers.entries(),
    )
    names = [entry.name for entry in entries]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"entries of the zoo share a name: {sorted(repeated)}")
    return entries


def entry(name: str) -> ZooEntry:
    """The entry called ``name``; KeyError if there is none."""
    for candidate in zoo():
        if candidate.name == name:
            return candidate
    raise KeyError(name)


def main(arguments: Sequence[str]) -> int:
    """List the entries whose name matches a regular expression (all by default)."""
    pattern = re.compile(arguments[0] if arguments else "")
    matching = [e for e in zoo() if pattern.search(e.name)]
    for candidate in matching:
        print(f"{candidate.name:45} {'dynamic' if candidate.dynamic_shapes else 'static'}")
    print(f"{len(matching)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
