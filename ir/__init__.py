"""What a program is, and the only way to change it. No policy."""

if __name__ != "planish.ir":
    raise ImportError("import this package as 'planish.ir'")

from planish.ir import operators, quant_ops
from planish.ir.capture import capture, from_exported
from planish.ir.exported import to_exported_program
from planish.ir.files import load, save
from planish.ir.pattern import Match, Refusal, Rule, rewrite_greedily
from planish.ir.program import Program, Signature
from planish.ir.rewriter import Change, Rewriter, SiteCounter
from planish.ir.text import text
from planish.ir.textdiff import diff

__all__ = [
    "Change",
    "Match",
    "Program",
    "Refusal",
    "Rewriter",
    "Rule",
    "Signature",
    "SiteCounter",
    "capture",
    "diff",
    "from_exported",
    "load",
    "operators",
    "quant_ops",
    "rewrite_greedily",
    "save",
    "text",
    "to_exported_program",
]
