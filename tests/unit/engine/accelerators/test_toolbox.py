"""NVIDIA's libraries are put beside a prebuilt engine by the package client, and nothing else is."""

import sys
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import toolbox

CLIENT = """
import pathlib, sys
if FAILS:
    sys.exit("no such package")
into = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
for name in NAMES:
    (into / name / "lib").mkdir(parents=True)
(into / NAMES[0] / "wanted").write_text(" ".join(sys.argv))
"""


def client(tmp_path: Path, *names: str) -> tuple[str, ...]:
    """A package client that brings these folders; without any, it fails."""
    path = tmp_path / f"client-{len(names)}.py"
    path.write_text(f"NAMES = {names!r}\nFAILS = {not names}\n{CLIENT}")
    return (sys.executable, str(path))


def test_they_lie_beside_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working = client(tmp_path, "nvidia", "nvidia_x_cu12-1.dist-info")
    monkeypatch.setattr(toolbox, "package_clients", lambda: [client(tmp_path), working])
    into = tmp_path / "wheel"
    into.mkdir()
    toolbox.add_libraries(("nvidia-x-cu12>=1",), into)
    assert sorted(one.name for one in into.iterdir()) == ["nvidia", "nvidia_x_cu12-1.dist-info"]
    asked = (into / "nvidia" / "wanted").read_text()
    assert asked.endswith(" nvidia-x-cu12>=1")
    assert "--only-binary :all:" in asked


def test_what_is_not_nvidias_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolbox, "package_clients", lambda: [client(tmp_path, "nvidia", "msgspec")])
    into = tmp_path / "wheel"
    into.mkdir()
    with pytest.raises(MeshError, match="they bring msgspec, which is not NVIDIA's"):
        toolbox.add_libraries(("nvidia-x-cu12",), into)
    assert not list(into.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(toolbox, "package_clients", lambda: [client(tmp_path)] if there else [])
    with pytest.raises(MeshError, match="nvidia-x-cu12 could not be downloaded") as caught:
        toolbox.add_libraries(("nvidia-x-cu12",), tmp_path)
    assert caught.value.code == "accelerator_download_failed"
    assert ("no such package" if there else "neither pip nor uv") in caught.value.message
