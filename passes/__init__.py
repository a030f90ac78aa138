"""Passes: the contract every pass owes, the pipeline that checks it, and the passes themselves."""

if __name__ != "planish.passes":
    raise ImportError("import this package as 'planish.passes'")

from planish.ir.pattern import Refusal
from planish.ir.rewriter import Change
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult

__all__ = ["Change", "Contract", "Fact", "Pass", "PassContext", "PassResult", "Refusal"]
