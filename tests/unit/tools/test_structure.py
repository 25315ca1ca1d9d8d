import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "structure.py"


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure_tool", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_forwards_and_who_has_one_importer(
    structure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "mesh_llm"
    package.mkdir()
    (package / "__init__.py").write_text('"""Only words."""\n')
    (package / "a.py").write_text(
        "class Door:\n"
        "    def __init__(self, inner):\n        self._inner = inner\n"
        "    def open(self, key):\n        return self._inner.open(key)\n"
        "    async def shut(self):\n        await self._inner.shut()\n"
        "    def turned(self, key):\n        return self._inner.open(key + 1)\n"
    )
    (package / "b.py").write_text("from mesh_llm.a import Door\n")
    (package / "c.py").write_text("import mesh_llm.b\n")
    monkeypatch.setattr(sys, "argv", ["structure.py", "--list", str(tmp_path)])
    assert structure.main() == 0
    shown = capsys.readouterr().out
    assert "3 files, 11 lines" in shown
    assert "1 classes, 1 that mostly forward, 2 methods that only forward" in shown
    assert "2 files with one importer, 2 of them under 60 lines" in shown
    assert "a.py (9) <- mesh_llm.b" in shown
    monkeypatch.setattr(sys, "argv", ["structure.py", str(tmp_path / "nowhere")])
    assert structure.main() == 2
