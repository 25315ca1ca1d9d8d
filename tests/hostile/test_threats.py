"""docs/security.md names a test for each threat: every one of them exists, and every hostile test file is named."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "security.md"
SHORT = {"i/": "integration/", "u/": "unit/", "h/": "hostile/"}
NAMED = re.compile(r"`([^`]*test_\w+\.py|…)(?:::(test_\w+))?`")


def rows() -> list[tuple[str, str]]:
    """Threat and tests of each line of the table."""
    table = PAGE.read_text().partition("## Threats")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [(cells[0].strip(), cells[-1].strip()) for cells in lines[2:]]


def full(path: str) -> Path:
    for short, long in SHORT.items():
        path = path.replace(short, long, 1) if path.startswith(short) else path
    return TESTS / path


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("threat", "tests"), rows(), ids=[threat[:40] for threat, _ in rows()])
def test_each_threat_has_tests_that_exist(threat: str, tests: str) -> None:
    found = NAMED.findall(tests)
    last: Path | None = None
    places = re.findall(r"`((?:u|h|i|fuzz|sim|e2e|property)/[\w/]*)`", tests)
    assert found or places, f"no test is named for: {threat}"
    for place in places:
        assert full(place).is_dir(), place
    for path, function in found:
        target = last if path == "…" else full(path)
        assert target is not None, f"… stands for nothing in: {threat}"
        last = target
        assert target.exists(), f"{threat}: there is no {target}"
        if function:
            assert function in functions(target), f"{threat}: there is no {function} in {path}"


def test_every_hostile_test_is_named() -> None:
    page = PAGE.read_text()
    missing = [path.name for path in (TESTS / "hostile").glob("test_*.py") if path.name not in page]
    assert not missing, f"docs/security.md says nothing of {missing}"
