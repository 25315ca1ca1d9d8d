"""Every task that a node cannot do without is supervised, and `runtime/supervision.py` says which these are."""

import ast
import re
from functools import cache
from pathlib import Path

import mesh_llm
from mesh_llm.runtime import supervision

SOURCE = Path(mesh_llm.__file__).parent
DOCUMENT = Path(__file__).parents[3] / "docs" / "reliability.md"


def essential() -> dict[str, list[str]]:
    """The essential tasks by name, with the files that start them, as the module's docstring lists them."""
    found = re.findall(r"^- ([^(\n]+?) \(([a-z_/., \n]+\.py)\):", supervision.__doc__ or "", re.MULTILINE)
    return {name: re.split(r",\s+", files) for name, files in found}


@cache
def calls(method: str) -> tuple[tuple[str, ast.Module, ast.Call], ...]:
    """Each call of `SCOPE.method(...)` in the package, with its file."""
    sources = ((path.relative_to(SOURCE).as_posix(), path.read_text()) for path in sorted(SOURCE.rglob("*.py")))
    trees = [(file, ast.parse(source)) for file, source in sources if f".{method}(" in source]
    return tuple(
        (file, tree, node)
        for file, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    )


def test_every_service_is_listed_with_its_file_and_every_listed_task_is_started_there() -> None:
    listed = {file for files in essential().values() for file in files}
    supervised = {file for file, _, _ in calls("supervise")} - {"runtime/supervision.py"}
    assert len(essential()) > 10
    # The driver alone is a job: its end is the node's end.
    assert listed == supervised
    assert essential()["daemon/driver"] == ["daemon/main.py"]


def test_every_service_has_the_name_that_is_listed() -> None:
    names = [name.rpartition("/")[2] for entry in essential() for name in entry.split(" and ")]
    for file, _, call in calls("supervise"):
        if isinstance(call.args[1], ast.Constant):
            assert call.args[1].value in names, f"{file} starts a service that is not listed"


def test_no_endless_loop_is_a_job_that_could_end_with_a_log_line() -> None:
    """A job that loops for ever needs a handler of its failure: its own, or its scope's."""
    endless: list[str] = []
    for file, tree, call in calls("spawn"):
        handled = len(call.args) + len(call.keywords) > 2 or _scope_handles_failures(tree)
        if not handled and isinstance(call.args[0], ast.Call) and _is_endless(tree, call.args[0].func):
            endless.append(f"{file}: {ast.unparse(call)}")
    assert not endless


def test_the_table_names_every_scope() -> None:
    text = DOCUMENT.read_text()
    table = text[text.index("## Services and jobs") : text.index("## Chaos")]
    cells = {
        word.strip() for line in table.splitlines() if line.startswith("|") for word in line.split("|")[1].split(",")
    }
    scopes: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        scopes |= set(re.findall(r'TaskScope\(\s*f?"([^"]*)"', file.read_text()))
    # Names with a part that varies: `child {process.pid}`.
    names = {"split NAME" if name.startswith("split {") else re.split(r"[ -]?\{", name)[0] for name in scopes}
    assert names - {"peer"} <= cells, names - cells


def _scope_handles_failures(tree: ast.Module) -> bool:
    scopes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TaskScope"
    ]
    return bool(scopes) and all(len(scope.args) + len(scope.keywords) > 1 for scope in scopes)


def _is_endless(tree: ast.Module, function: ast.expr) -> bool:
    """Whether a function of the same file loops for ever: `while True` without a way out."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return any(
        isinstance(node, ast.While)
        and isinstance(node.test, ast.Constant)
        and not any(isinstance(inner, ast.Return | ast.Break) for inner in ast.walk(node))
        for definition in ast.walk(tree)
        if isinstance(definition, ast.AsyncFunctionDef) and definition.name == name
        for node in ast.walk(definition)
    )
