"""The code that jinja2 writes for a chat template, with loops counted and what a template makes charged (see sandbox.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst

MAX_CONSTANT = 256  # characters of a constant that is compared at no charge
MAX_OPERANDS = 4  # variables added before the sum is charged
# Names of the filters that every loop's iterable goes through, and what is compared where that may take long.
TURNS, COMPARED = "turns", "compared"


class ChargedCode(CodeGenerator):
    """Writes the template's code with loops counted, and sums, slices and literal collections charged."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.counted: set[nodes.Node] = (
            set()
        )  # sums that are written at once: what is written is counted there

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        self.counted.update(child for child in node.nodes if isinstance(child, nodes.Add))
        super().visit_Output(node, frame)

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for loop in node.find_all(nodes.For):
            if loop.recursive:
                self.fail("recursive loops are not run", loop.lineno)
            loop.iter = _through(TURNS, loop.iter)
        for comparison in node.find_all(nodes.Compare):
            _count_comparison(comparison)
        for item in node.find_all(nodes.Getitem):
            if not isinstance(item.arg, nodes.Const | nodes.Slice | nodes.Neg):
                item.arg = _through(COMPARED, item.arg)
        super().visit_Template(node, frame)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape is not run", node.lineno)

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape is not run", node.lineno)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("(" if _is_text(node) else "environment.written(")

    @optimizeconst
    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """a + b + c as it stands, charged at its end and after each MAX_OPERANDS variables."""
        operands: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        operands.append(left)
        breaks, variables = [], 0
        for index, operand in enumerate(reversed(operands)):
            variables += not isinstance(operand, nodes.Const)
            if variables >= MAX_OPERANDS and index < len(operands) - 1:
                breaks.append(index)
                variables = 1
        if breaks or variables > 2 or node not in self.counted:
            breaks.append(len(operands) - 1)
        self.write("environment.made(" * len(breaks))
        for index, operand in enumerate(reversed(operands)):
            self.write(" + " if index else "")
            self.write("(")
            self.visit(operand, frame)
            self.write(")" * (2 if index in breaks else 1))

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        parts = node.nodes
        while len(parts) > MAX_OPERANDS:
            inner = nodes.Concat(parts[:MAX_OPERANDS], lineno=node.lineno)
            inner.set_environment(self.environment)
            parts = [inner, *parts[MAX_OPERANDS:]]
        self.write("environment.together((")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.sliced(")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


def _through(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno, environment=value.environment)


def _count_comparison(node: nodes.Compare) -> None:
    """Both sides are counted, but where one is a constant that ends the comparison soon."""
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    kinds = {operand.op for operand in node.ops}
    last = sides[-1]
    if not kinds & {"in", "notin"}:
        ends_soon = any(map(_is_short, sides))
    else:
        ends_soon = (
            len(sides) == 2 and isinstance(last, nodes.List | nodes.Tuple) and all(map(_is_short, last.items))
        )
    if ends_soon:
        return
    if not _is_short(node.expr):
        node.expr = _through(COMPARED, node.expr)
    for operand in node.ops:
        if not _is_short(operand.expr):
            operand.expr = _through(COMPARED, operand.expr)


def _is_text(node: nodes.Node) -> bool:
    """Whether it is a text for certain: what is added to a text is one."""
    while isinstance(node, nodes.Add):
        if _is_text(node.right):
            return True
        node = node.left
    return isinstance(node, nodes.Concat) or (isinstance(node, nodes.Const) and isinstance(node.value, str))


def _is_short(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and len(str(node.value)) <= MAX_CONSTANT
