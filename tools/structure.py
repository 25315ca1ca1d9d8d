"""How the code is cut: files, lines, methods and classes that only forward, and files with one importer.

    python tools/structure.py [--list]

A list of places to look at, not a verdict: it fails on nothing. `make check` prints the figures.
"""

import argparse
import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "mesh_llm"
SLIVER_LINES = 60
"""A file with fewer lines belongs to the file that uses it, unless several do."""


class Module(NamedTuple):
    """One file of the package: its dotted name, path, number of lines and syntax tree."""

    name: str
    path: Path
    lines: int
    tree: ast.Module


def main() -> int:
    """Print the figures; with `--list` also the places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also name the classes and files")
    parser.add_argument("source", nargs="?", type=Path, default=Path("src"), help="directory that holds the package")
    options = parser.parse_args()
    modules = list(read_modules(options.source))
    if not modules:
        print(f"structure: there is no package {PACKAGE} in {options.source}", file=sys.stderr)
        return 2
    classes = [(module, node) for module in modules for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    counted = [(module, node, *forwarding(node)) for module, node in classes]
    methods = sum(forwards for _, _, forwards, _ in counted)
    mostly = [
        f"{module.path}: {node.name} ({forwards} of {count} methods)"
        for module, node, forwards, count in counted
        if forwards and 2 * forwards >= count
    ]
    single = list(single_importers(modules))
    slivers = [f"{module.path} ({module.lines}) <- {importer}" for module, importer in single if _is_sliver(module)]
    sizes = [module.lines for module in modules]
    print(
        f"structure: {len(modules)} files, {sum(sizes)} lines, median {statistics.median(sizes):.0f} a file; "
        f"{len(classes)} classes, {len(mostly)} that mostly forward, {methods} methods that only forward; "
        f"{len(single)} files with one importer, {len(slivers)} of them under {SLIVER_LINES} lines"
    )
    if options.list:
        for kind, places in (("forwards", mostly), ("sliver", slivers)):
            for place in places:
                print(f"  {kind:<9} {place}")
    return 0


def read_modules(source: Path) -> Iterator[Module]:
    """All modules of the package below `source`, without the docstring-only `__init__` files."""
    for path in sorted((source / PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if path.name == "__init__.py" and all(isinstance(node, ast.Expr) for node in tree.body):
            continue
        parts = path.relative_to(source).with_suffix("").parts
        yield Module(".".join(parts).removesuffix(".__init__"), path, text.count("\n"), tree)


def forwarding(node: ast.ClassDef) -> tuple[int, int]:
    """How many methods of a class only hand their own arguments on to a part of it, and how many it has.

    `__init__` does not count, and of a protocol no method.
    """
    if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
        return 0, 0
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    methods = [method for method in methods if method.name != "__init__"]
    return sum(_forwards(method) for method in methods), len(methods)


def single_importers(modules: list[Module]) -> Iterator[tuple[Module, str]]:
    """Each module that exactly one other imports, and that other's name."""
    importers: dict[str, set[str]] = {module.name: set() for module in modules}
    for module in modules:
        for name in _imported(module.tree):
            target = name if name in importers else name.rpartition(".")[0]
            if target in importers and target != module.name:
                importers[target].add(module.name)
    for module in modules:
        if len(importers[module.name]) == 1:
            yield module, min(importers[module.name])


def _is_sliver(module: Module) -> bool:
    return module.lines < SLIVER_LINES


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _forwards(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    body = [item for item in method.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr):
        return False
    value = body[0].value
    if isinstance(value, ast.Await):
        value = value.value
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return False
    arguments = method.args
    own = {item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} - {"self", "cls"}
    given = [*value.args, *(keyword.value for keyword in value.keywords)]
    passed = {item.id for item in given if isinstance(item, ast.Name)}
    return _is_part_of_self(value.func.value) and len(passed) == len(given) and passed == own


def _is_part_of_self(node: ast.expr) -> bool:
    """Whether this is `self.x`, or deeper."""
    while isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name):
            return node.value.id == "self"
        node = node.value
    return False


if __name__ == "__main__":
    sys.exit(main())
