"""What the documentation names exists: modules, folders, tests, and pages that are linked."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])
_PACKAGES = "api|cli|console|core|daemon|discovery|engine|models|net|runtime|simulation|split|wire"
_IN_PACKAGE = re.compile(rf"`(?:src/mesh_llm/)?((?:{_PACKAGES})/[\w/]*(?:\.py)?)`")
_IN_REPOSITORY = re.compile(r"`((?:tests|tools|bench|web)/[\w/]+\.(?:py|ts|svelte))")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _missing(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for name in _IN_PACKAGE.findall(text):
        place = ROOT / "src" / "mesh_llm" / name
        if not (place.exists() or place.with_suffix(".py").exists()):
            yield name
    for name in _IN_REPOSITORY.findall(text):
        if not (ROOT / name).exists():
            yield name
    for name in _LINK.findall(text):
        if "://" not in name and not (page.parent / name).exists():
            yield f"link to {name}"


def test_everything_that_a_page_names_exists() -> None:
    assert len(PAGES) > 20
    missing = [f"{page.relative_to(ROOT)}: {name}" for page in PAGES for name in _missing(page)]
    assert not missing, "\n".join(missing)


def test_the_page_of_the_configuration_has_every_option() -> None:
    program = [sys.executable, str(ROOT / "tools" / "config_docs.py")]
    tables = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
    assert "| `ctx-size = 16384` | `MESH_LLM_CTX_SIZE` | at once |" in tables
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert tables in page, "The options changed. Write the page again: .venv/bin/python tools/config_docs.py --write"
