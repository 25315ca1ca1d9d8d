"""What the documentation names exists: modules, folders, tests, and pages that are linked."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.faults import FAULTS

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


_NUMBERS = {"eighteen": 18, "nineteen": 19, "twenty": 20, "twenty-one": 21, "twenty-two": 22, "twenty-five": 25}


def test_the_pages_count_the_faults_of_chaos() -> None:
    """What `make chaos` can do now; and of the run that was measured, what its own table shows."""
    readme, testing, reliability = (
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/testing.md", "docs/reliability.md")
    )
    assert _number(r"breaks a mesh under load in ([\w-]+) ways", readme) == len(FAULTS)
    assert _number(r"under load, with (\d+) kinds of faults", testing) == len(FAULTS)
    run = reliability.partition("<!-- chaos: begin -->")[2].partition("<!-- chaos: end -->")[0]
    names = {fault.name for fault in FAULTS}
    times = {cells[1].strip(): cells[2] for line in run.splitlines() if len(cells := line.split("|")) > 2}
    struck = {name: int(count) for name, count in times.items() if name in names}
    assert _number(r"\d+ faults of ([\w-]+) kinds", readme) == len(struck)
    assert _number(r"(\d+) faults of [\w-]+ kinds", readme) == sum(struck.values())


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no page says {pattern!r}"
    return _NUMBERS[found[1]] if found[1] in _NUMBERS else int(found[1])
