"""What a story needs to know of one state of a program: names, lines of text, readers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from planish.ir.program import Constant, Program
from planish.ir.tensortype import tensor_type, type_text
from planish.ir.text import constant_lines, node_text, value_names


class State:
    """One state of a program. Values are named as in the graph, constants as ``@conv.weight``.

    ``forget`` drops the program; the names stay.
    """

    def __init__(self, program: Program):
        self._program: Program | None = program
        self._texts = value_names(program)
        self.nodes = {n.name: n for n in program.nodes if n.op in ("placeholder", "call_function")}
        self.constants: dict[str, Constant] = {}
        self.readers_of: dict[str, str] = {}  # node that reads a constant -> @constant
        self._reading: dict[str, Node] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            self._reading[node.name] = node
            self.readers_of[node.name] = f"@{node.target}"
            self.constants[f"@{node.target}"] = program.constants[str(node.target)]
        self.printed = {text: n.name for n, text in self._texts.items() if n.op != "get_attr"}
        own = {n: n.name if n.op == "call_function" else text for n, text in self._texts.items()}
        self.lines_by_name = {n.name: node_text(program, n, own) for n in program.operators}

    def forget(self) -> None:
        """Let go of the program."""
        self._program = None
        self._texts, self.nodes, self.constants = {}, {}, {}
        self._reading, self.lines_by_name = {}, {}

    def names(self) -> Iterator[str]:
        """Constants, inputs and operators."""
        yield from sorted(self.constants)
        yield from self.nodes

    def line(self, name: str) -> str | None:
        """The line of canonical text that declares a value; of a constant with its digest."""
        program = self._program
        if program is None:
            return None
        if name in self.constants:
            value = self.constants[name]
            lines = constant_lines(program, name[1:], values=isinstance(value, Tensor))
            return lines[0].strip()
        node = self.nodes.get(name)
        if node is None:
            return None
        if node.op == "placeholder":
            return f"{self._texts[node]}: {self.type(name)}"
        return node_text(program, node, self._texts)

    def type(self, name: str) -> str | None:
        """The type of a value, as text."""
        program = self._program
        if program is None or (name not in self.nodes and name not in self.constants):
            return None
        symbols = program.signature.symbols
        value = self.constants.get(name)
        if isinstance(value, Tensor):
            return str(tensor_type(value, symbols, program.layouts.get(name[1:])))
        return type_text(self.nodes[name].meta.get("val"), symbols) if name in self.nodes else None

    def readers(self, name: str) -> tuple[str, ...]:
        """Names of the operators that read a value; ``return`` for the program's results."""
        program = self._program
        if program is None:
            return ()
        read = [n for n in program.nodes if name in (n.name, self.readers_of.get(n.name))]
        users = dict.fromkeys(user.name for node in read for user in node.users)
        return tuple("return" if user == program.output.name else user for user in users)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the nodes that a new node was made from, as the rewriter stamped it."""
        node = self.nodes.get(name) or self._reading.get(name)
        return node.meta["from"][2] if node is not None and "from" in node.meta else ()

    def operands(self, name: str) -> tuple[str, ...]:
        """Names of the nodes that a node reads."""
        node = self.nodes.get(name)
        return tuple(n.name for n in node.all_input_nodes) if node is not None else ()


def module_of(node: Node) -> str:
    """``module encoder.layer.0 (BertLayer)``, where a node was captured."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"module {path or '(the model)'} ({name.rpartition('.')[2]})"
