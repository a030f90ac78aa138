"""planish's own operators in generated source: what they mean, in torch alone.

The generated file takes the registered operator where planish is loaded, so that a pass finds the
operator it looks for, and the plain function elsewhere. The functions are copied from planish's own
source, so the two cannot drift apart.
"""

from __future__ import annotations

import inspect
import pprint
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch._ops import OpOverload

from planish.ir import operators, quant_ops, quantscheme

_QUANTIZE = (quantscheme.spread, quantscheme.quantize_linear, quant_ops.quantize)
_DEQUANTIZE = (quantscheme.spread, quantscheme.dequantize_linear, quant_ops.dequantize)

# Operator -> the functions that say what it means, its own last.
_MEANINGS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "quantize": _QUANTIZE,
    "dequantize": _DEQUANTIZE,
    "dynamic_quantize": (quant_ops.dynamic_quantize,),
    "rotary_embedding": (operators.rotate, operators.rotary_embedding),
}

_PREFIX = "planish_"

_CHOOSE = '''

def registered(name, plain):
    """The operator of planish where it is loaded, else the same in plain torch."""
    return getattr(torch.ops.planish, name, plain)
'''


def operator_name(target: OpOverload) -> str | None:
    """The name that an operator of planish's own has in the generated file; else None."""
    namespace, _, name = target._schema.name.partition("::")
    return f"{_PREFIX}{name}" if namespace == "planish" and name in _MEANINGS else None


def reserved_names() -> frozenset[str]:
    """Names that mean something in a file that uses these operators."""
    functions = {f.__name__ for group in _MEANINGS.values() for f in group}
    return frozenset({*functions, *(_PREFIX + n for n in _MEANINGS), "INTEGERS", "registered"})


def operators_source(targets: Iterable[Any]) -> str:
    """Definitions of the operators among these targets; empty where there is none."""
    names = {operator_name(t) for t in targets if isinstance(t, OpOverload)} - {None}
    used = sorted(str(name).removeprefix(_PREFIX) for name in names)
    if not used:
        return ""
    functions = dict.fromkeys(f for name in used for f in _MEANINGS[name])
    # Annotations as text: the file imports nothing for them.
    table = pprint.pformat(quantscheme.INTEGERS, width=90, sort_dicts=False)
    parts = ["", "", f"INTEGERS = {table}"]
    for function in functions:
        parts += ["", "", inspect.getsource(function).rstrip()]
    source = "\n".join(parts) + "\n" + _CHOOSE
    taken = "\n".join(f'{_PREFIX}{n} = registered("{n}", {n})' for n in used)
    return f"{source}\n\n{taken}\n"
