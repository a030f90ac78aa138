"""Which passes there are: a literal table, plus the entry points of other packages.

Nothing registers itself by being imported. A package that brings passes of its own says in its
``pyproject.toml``::

    [project.entry-points."planish.passes"]
    my-pass = "my_package.module:MyPass"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points

from planish.ir.errors import RecipeError
from planish.passes.base import Contract, Pass
from planish.passes.spec import suggestion

GROUP = "planish.passes"

# In the order in which the documentation lists them.
REGISTRY: Mapping[str, str] = {
    "fold-constants": "planish.passes.cleanup.fold_constants:FoldConstants",
    "fold-ranges": "planish.passes.cleanup.fold_ranges:FoldRanges",
    "remove-identities": "planish.passes.cleanup.remove_identities:RemoveIdentities",
    "simplify-layout": "planish.passes.cleanup.simplify_layout:SimplifyLayout",
    "merge-duplicate-constants": (
        "planish.passes.cleanup.merge_duplicate_constants:MergeDuplicateConstants"
    ),
    "eliminate-common-subexpressions": (
        "planish.passes.cleanup.eliminate_common_subexpressions:EliminateCommonSubexpressions"
    ),
    "eliminate-dead-code": "planish.passes.cleanup.eliminate_dead_code:EliminateDeadCode",
    "recover-norms": "planish.passes.fuse.norms:RecoverNorms",
    "recover-activations": "planish.passes.fuse.activations:RecoverActivations",
    "recover-rotary": "planish.passes.fuse.rotary:RecoverRotary",
    "recover-attention": "planish.passes.fuse.attention:RecoverAttention",
    "fold-padding": "planish.passes.fold.fold_padding:FoldPadding",
    "fold-batch-norm": "planish.passes.fold.fold_batch_norm:FoldBatchNorm",
    "fold-scale-shift": "planish.passes.fold.fold_scale_shift:FoldScaleShift",
    "fold-scalar": "planish.passes.fold.fold_scalar:FoldScalar",
    "merge-linears": "planish.passes.fold.merge_linears:MergeLinears",
    "fuse-parallel-linears": "planish.passes.fuse.parallel_linears:FuseParallelLinears",
    "cast-half": "planish.passes.precision.cast_half:CastHalf",
    "quantize": "planish.passes.quantize.quantize:Quantize",
    "keep-float": "planish.passes.quantize.keep_float:KeepFloat",
    "smooth-quant": "planish.passes.equalize.smooth_quant:SmoothQuant",
    "migrate-gamma": "planish.passes.equalize.migrate_gamma:MigrateGamma",
    "split-outliers": "planish.passes.rounding.split_outliers:SplitOutliers",
    "equalize-layers": "planish.passes.equalize.equalize_layers:EqualizeLayers",
    "absorb-bias": "planish.passes.equalize.absorb_bias:AbsorbBias",
    "adaround": "planish.passes.rounding.adaround:AdaRound",
    "correct-bias": "planish.passes.rounding.correct_bias:CorrectBias",
    "learn-ranges": "planish.passes.rounding.learn_ranges:LearnRanges",
    "round-weights": "planish.passes.rounding.round_weights:RoundWeights",
    "choose-bits": "planish.passes.rounding.choose_bits:ChooseBits",
    "hqq": "planish.passes.rounding.hqq:Hqq",
    "gptq": "planish.passes.rounding.gptq:Gptq",
    "awq": "planish.passes.rounding.awq:Awq",
    "sparsify": "planish.passes.sparsify.sparsify:Sparsify",
    "interpolate": "planish.passes.prune.interpolate:Interpolate",
    "prune": "planish.passes.prune.prune:Prune",
    "prune-transformer": "planish.passes.prune.transformer:PruneTransformer",
    "factorize": "planish.passes.factorize.factorize:Factorize",
}


@cache
def _foreign() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Entry points of other packages by name; more than one where packages disagree."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def pass_names() -> tuple[str, ...]:
    """The names of all passes that can be written in a recipe."""
    return tuple(dict.fromkeys((*REGISTRY, *_foreign())))


def load_pass(name: str) -> type[Pass]:
    """Import a pass by its name.

    Raises:
        RecipeError: there is no such pass, two packages claim its name, or it cannot be imported.
    """
    return _load(name, _location(name))


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name; imports them all.

    Raises:
        RecipeError: a package advertises a pass that cannot be imported.
    """
    return {name: load_pass(name) for name in pass_names()}


def load_class(location: str) -> type[Pass]:
    """Import a pass by ``module:Class``; the module's code runs, as on any import.

    Raises:
        RecipeError: it cannot be imported, or is no pass.
    """
    module, _, path = location.partition(":")
    if not module or not path:
        raise RecipeError(f"{location!r} names no class", hint="write package.module:Class")
    if "<locals>" in path:
        raise RecipeError(
            f"the pass {location!r} was defined inside a function and cannot be imported",
            hint="move the class to the top level of a module, or pass the instance itself",
        )
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # importing runs arbitrary code, which may fail in any way
        raise RecipeError(
            f"the pass {location!r} cannot be imported: {type(error).__name__}: {error}",
            hint="install its package, or put its module on PYTHONPATH",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise RecipeError(f"{location!r} is no pass", hint="it must subclass planish.passes.Pass")
    check_class(found)
    return found


def check_class(cls: type[Pass]) -> None:
    """Hold a pass to what every pass declares.

    Raises:
        RecipeError: its name or its contract is missing.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not isinstance(getattr(cls, "contract", None), Contract):
        raise RecipeError(
            f"the pass {cls.__module__}:{cls.__qualname__} lacks a name or a contract",
            hint='write name: ClassVar[str] = "my-pass" and contract = Contract.EXACT or LOSSY',
        )


def name_of(cls: type[Pass]) -> str:
    """How a recipe names a pass: by its registered name, else as ``module:Class``."""
    location = f"{cls.__module__}:{cls.__qualname__}"
    name = getattr(cls, "name", None)
    if REGISTRY.get(name) == location:  # type: ignore[arg-type]  # None is in no table
        return str(name)
    if name not in REGISTRY and len(_foreign().get(str(name), ())) == 1:
        # The entry point may name the class by a shorter path than its own module.
        if load_pass(str(name)) is cls:
            return str(name)
    return location


def _location(name: str) -> str:
    claims: list[str] = [REGISTRY[name]] if name in REGISTRY else []
    claims += [f"{entry.module}:{entry.attr}" for entry in _foreign().get(name, ())]
    if not claims:
        raise RecipeError(
            f"there is no pass {name!r}", hint=suggestion(name, pass_names(), "passes")
        )
    if len(claims) > 1:
        raise RecipeError(
            f"the pass name {name!r} is claimed {len(claims)} times: {', '.join(claims)}",
            hint=f"uninstall one of the packages, or write {claims[-1]} in place of the name",
        )
    return claims[0]


@cache
def _load(name: str, location: str) -> type[Pass]:
    cls = load_class(location)
    if cls.name != name:
        raise RecipeError(
            f"{location} calls itself {cls.name!r} but is registered as {name!r}",
            hint="give both the same name",
        )
    return cls
