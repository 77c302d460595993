"""What holds for all source files of the application, read as syntax trees; nothing is imported."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = 400
"""What a reader can keep in mind."""


def name_of(file: Path) -> str:
    """The dotted name of a module, of a package for its `__init__.py`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(file): file for file in sorted((ROOT / "app").rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in SOURCES.items()}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The modules of the application that a tree imports outside of functions, also those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                if inner in SOURCES:
                    yield inner
                elif origin in SOURCES:
                    yield origin
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, package)


def test_a_class_name_has_one_meaning() -> None:
    """No two classes of the application have the same name, so a name alone tells which class is meant."""
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_a_file_is_read_in_one_go() -> None:
    """No file of the application, of whatever kind, is longer than a reader can keep in mind."""
    files = [file for file in (ROOT / "app").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > LINES} == {}


def test_imports_make_no_circle() -> None:
    """Files can be read in an order in which each uses only what was read before, types included."""
    needs: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
        needs[module] = set(imports(tree, package))
    circle: list[str] = []
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []
    # So many that the trees have been read.
    assert sum(map(len, needs.values())) > len(SOURCES)
