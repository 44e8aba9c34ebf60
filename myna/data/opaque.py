"""Whether a chat template only hands the contents of messages through: told from its code, without running it.

Of such a template what it writes around the contents depends on the roles alone, so it can be found out once (`frames`).
Contents may be joined to text, trimmed, asked whether they are a text or there at all, and kept under a name. Anything
else that a template does with them (comparing, splitting, searching, filters, macros) makes the answer no.

    kind     an expression's value
    PLAIN    depends on roles and settings alone
    CONTENT  holds the content of a message, or something plain
    STRUCT   a message, or messages
    SPACE    a namespace: its attributes have kinds of their own, so it is known by one name, and read by attributes alone
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from jinja2 import nodes


class Kind(IntEnum):
    PLAIN = 0
    CONTENT = 1
    STRUCT = 2
    SPACE = 3


class _LooksInsideError(Exception):
    """The template does something with contents that is not known to leave them as they are."""


# Of a content that is a text with something in it the answer is always the same.
TESTS = frozenset({"string", "defined", "undefined", "none", "mapping", "number", "boolean"})
# Of messages the answer depends on their roles and number.
STRUCT_TO_PLAIN = frozenset({"length", "count"})
STRUCT_TO_STRUCT = frozenset({"first", "last", "list", "reverse"})
OF_A_MESSAGE = frozenset(
    {"role", "content", "weight", "name", "tool_calls", "tool_call_id", "function_call", "type", "tools"}
    | {"reasoning_content", "reasoning", "thinking", "prefix"}
)
OF_A_LOOP = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"}
)
STRIPS = frozenset({"strip", "trim"})


def is_opaque(parsed: nodes.Template) -> bool:
    """Whether the template, parsed, never looks into a content."""
    kinds: dict[Any, Kind] = {"messages": Kind.STRUCT}
    try:
        while True:  # until no name becomes more than it was: a loop's later turns see what earlier ones set
            before = dict(kinds)
            _Walk(kinds).body(parsed.body)
            if kinds == before:
                return True
    except _LooksInsideError:
        return False


class _Walk:
    """Goes through statements and gives each name the most that it may hold."""

    def __init__(self, kinds: dict[Any, Kind]) -> None:
        self._kinds = kinds

    def body(self, statements: list[nodes.Node]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                _require(self._kind(part) != Kind.STRUCT)
        elif isinstance(node, nodes.If):
            self._kind(node.test)
            self.body(node.body)
            for other in node.elif_:
                self._statement(other)
            self.body(node.else_)
        elif isinstance(node, nodes.For):
            kind = self._kind(node.iter)
            _require(kind != Kind.CONTENT and not node.recursive)
            _require(isinstance(node.target, nodes.Name))
            self._raise(node.target.name, kind)  # type: ignore[attr-defined]
            if node.test is not None:
                self._kind(node.test)
            self.body(node.body)
            self.body(node.else_)
        elif isinstance(node, nodes.Assign):
            kind = self._assigned(node.node)
            if isinstance(node.target, nodes.NSRef):
                _require(kind != Kind.SPACE)
                _require(self._kinds.get(node.target.name) == Kind.SPACE)
                self._raise((node.target.name, node.target.attr), kind)
            else:
                _require(isinstance(node.target, nodes.Name))
                self._raise(node.target.name, kind)  # type: ignore[attr-defined]
        elif not isinstance(node, nodes.Break | nodes.Continue):
            raise _LooksInsideError

    def _assigned(self, node: nodes.Node) -> Kind:
        """The kind of what a name is given; the one place where a namespace may be made."""
        if not (isinstance(node, nodes.Call) and _is_named(node.node, "namespace")):
            return self._kind(node)
        _require(not node.args and not node.dyn_args and not node.dyn_kwargs)
        _require(all(self._kind(one.value) == Kind.PLAIN for one in node.kwargs))
        return Kind.SPACE

    def _raise(self, name: Any, kind: Kind) -> None:
        before = self._kinds.get(name, Kind.PLAIN)
        _require(max(before, kind) < Kind.STRUCT or before == kind or name not in self._kinds)
        self._kinds[name] = max(before, kind)

    def _kind(self, node: nodes.Node) -> Kind:
        """The kind of an expression's value."""
        if isinstance(node, nodes.Const | nodes.TemplateData):
            return Kind.PLAIN
        if isinstance(node, nodes.Name):
            kind = self._kinds.get(node.name, Kind.PLAIN)
            _require(node.name not in ("self", "loop", "namespace") and kind != Kind.SPACE)
            return kind
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self._part(node)
        if isinstance(node, nodes.Add):
            return self._joined([node.left, node.right])
        if isinstance(node, nodes.Concat):
            return self._joined(node.nodes)
        if isinstance(node, nodes.And | nodes.Or):
            return self._either(node.left, node.right)
        if isinstance(node, nodes.CondExpr):
            self._kind(node.test)
            return self._either(node.expr1, *([] if node.expr2 is None else [node.expr2]))
        if isinstance(node, nodes.Not):
            self._kind(node.node)  # whether a content is there is known: none is blank
            return Kind.PLAIN
        if isinstance(node, nodes.Test):
            return self._tested(node)
        if isinstance(node, nodes.Filter):
            return self._filtered(node)
        if isinstance(node, nodes.Call):
            return self._called(node)
        for child in node.iter_child_nodes():  # comparisons, arithmetic, lists: of plain values alone
            _require(self._kind(child) == Kind.PLAIN)
        _require(isinstance(node, nodes.Expr | nodes.Helper))
        return Kind.PLAIN

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        name = node.node.name if isinstance(node.node, nodes.Name) else None
        if isinstance(node, nodes.Getattr) and self._kinds.get(name) == Kind.SPACE:
            return self._kinds.get((name, node.attr), Kind.PLAIN)
        if name == "loop":
            _require(isinstance(node, nodes.Getattr) and node.attr in OF_A_LOOP)
            return Kind.PLAIN
        kind = self._kind(node.node)
        _require(kind != Kind.CONTENT)
        if isinstance(node, nodes.Getattr):
            key: Any = node.attr
        elif isinstance(node.arg, nodes.Const):
            key = node.arg.value
        else:
            key = node.arg
            parts = key.iter_child_nodes() if isinstance(key, nodes.Slice) else [key]
            _require(all(self._kind(part) == Kind.PLAIN for part in parts))
        if kind == Kind.PLAIN:
            return Kind.PLAIN
        if isinstance(key, str):
            _require(key in OF_A_MESSAGE)
            return Kind.CONTENT if key == "content" else Kind.PLAIN
        # a key that is computed could be any; what can only be a number is the place of a message
        _require(isinstance(key, int | nodes.Slice | nodes.Sub | nodes.Neg) or self._is_index(key))
        return Kind.STRUCT

    def _is_index(self, key: Any) -> bool:
        is_loop = isinstance(key, nodes.Getattr) and _is_named(key.node, "loop")
        return is_loop and key.attr.startswith(("index", "revindex"))

    def _joined(self, parts: list[Any]) -> Kind:
        kind = max(self._kind(part) for part in parts)
        _require(kind != Kind.STRUCT)
        return kind

    def _either(self, *parts: nodes.Node) -> Kind:
        kinds = {self._kind(part) for part in parts}
        _require(Kind.STRUCT not in kinds or len(kinds) == 1)
        return max(kinds)

    def _tested(self, node: nodes.Test) -> Kind:
        kind = self._kind(node.node)
        _require(kind == Kind.PLAIN or node.name in TESTS)
        _require(all(self._kind(one) == Kind.PLAIN for one in node.args))
        return Kind.PLAIN

    def _filtered(self, node: nodes.Filter) -> Kind:
        _require(node.node is not None)
        kind = self._kind(node.node)  # type: ignore[arg-type]
        has_arguments = bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if kind == Kind.PLAIN:
            _require(all(self._kind(one) == Kind.PLAIN for one in node.iter_child_nodes()))
            return Kind.PLAIN
        _require(not has_arguments)
        if kind == Kind.CONTENT:
            _require(node.name == "trim")
            return Kind.CONTENT
        _require(node.name in STRUCT_TO_PLAIN | STRUCT_TO_STRUCT)
        return Kind.PLAIN if node.name in STRUCT_TO_PLAIN else Kind.STRUCT

    def _called(self, node: nodes.Call) -> Kind:
        arguments = [*node.args, *(one.value for one in node.kwargs)]
        _require(not node.dyn_args and not node.dyn_kwargs)
        callee = node.node
        if isinstance(callee, nodes.Getattr) and self._kind(callee.node) == Kind.CONTENT:
            _require(callee.attr in STRIPS and not arguments)
            return Kind.CONTENT
        _require(self._kind(callee) == Kind.PLAIN)
        _require(all(self._kind(one) == Kind.PLAIN for one in arguments))
        return Kind.PLAIN


def _is_named(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _require(held: bool) -> None:
    if not held:
        raise _LooksInsideError
