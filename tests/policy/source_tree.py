"""The sources of the package as syntax trees: what the policy tests read instead of importing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "myna"


@dataclass(frozen=True)
class Source:
    """One module: its dotted name without `myna.` ("" for the package itself), its file and its tree."""

    name: str
    path: Path
    tree: ast.Module

    def at(self, node: ast.stmt | ast.expr | ast.arg | ast.ExceptHandler) -> str:
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"


def read_sources() -> list[Source]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Source(".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"))))
    assert len(found) > 5, "the sources are not where they were"
    return found


SOURCES = read_sources()
NAMES = frozenset(source.name for source in SOURCES)


def imported_modules(source: Source) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that a source imports, anywhere in it, by its full dotted name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(source, node)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole.removeprefix("myna.") in NAMES else base), node


def _base_of(source: Source, node: ast.ImportFrom) -> str:
    """`from . import x` counts from the package that the source lies in."""
    if not node.level:
        return node.module or ""
    package = f"myna.{source.name}".rstrip(".").split(".")
    if source.path.name != "__init__.py":
        package.pop()
    kept = package[: len(package) - (node.level - 1)]
    return ".".join([*kept, *([node.module] if node.module else [])])


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
