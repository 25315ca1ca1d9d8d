"""The build: its progress, what happens when it is interrupted, and its failure. A script stands for cmake."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import build
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.recipe import RECIPES, Examined
from mesh_llm.engine.sources.embedded.loading import VULKAN

CONFIGURE = 'echo "configure $*"; mkdir -p "$4"'


class Workshop:
    """Runs builds with a script in place of cmake."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.log, self.cmake = root / "work", root / "build.log", root / "cmake"
        self.steps: list[Step] = []
        self.unpacked = 0
        monkeypatch.setattr(build, "_unpack", self._unpack)
        monkeypatch.setattr(build, "_TELL_SECONDS", 0.0)

    def _unpack(self, _: Path, source: Path) -> Path:
        self.unpacked += 1
        ggml = source / "engine" / "thirdparty" / "llama.cpp" / "ggml"
        ggml.mkdir(parents=True, exist_ok=True)
        (source / "complete").touch()
        return ggml

    def script(self, compiling: str) -> None:
        self.cmake.write_text(
            f'#!/bin/sh\nif [ "$1" = -S ]; then {CONFIGURE}; exit 0; fi\nset -- "$2"\ncd "$1"\n{compiling}\n'
        )
        self.cmake.chmod(0o755)

    def build(self, options: tuple[str, ...] = (), on_step: Callable[[Step], None] = lambda _: None) -> Path:
        def progress(step: Step) -> None:
            self.steps.append(step)
            on_step(step)

        found = Examined(cmake=str(self.cmake), options=options)
        return build.build(RECIPES[VULKAN], found, Path("archive"), self.directory, self.log, progress)

    def percents(self) -> list[int | None]:
        return [step.percent for step in self.steps if step.name == "compile"]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


DONE = "mkdir -p bin; echo library > bin/libggml-vulkan.so"


def test_it_tells_percent_and_makes_the_library(workshop: Workshop) -> None:
    workshop.script(f"echo '[1/4] one'; echo '[2/4] two'; echo '[4/4] link'; {DONE}")
    assert workshop.build().read_text() == "library\n"
    assert [step.name for step in workshop.steps[:2]] == ["unpack", "configure"]
    assert workshop.percents() == [25, 50, 100]
    assert workshop.steps[-2].seconds_left is not None
    log = workshop.log.read_text()
    assert "GGML_VULKAN=ON" in log
    assert "[2/4] two" in log


def test_a_build_inside_of_it_is_not_counted(workshop: Workshop) -> None:
    workshop.script(f"echo '[1/10] outer'; echo '[1/2] inner'; echo '[2/2] inner'; echo '[2/10] outer'; {DONE}")
    workshop.build()
    assert workshop.percents() == [10, 20]


def test_make_tells_percent_itself(workshop: Workshop) -> None:
    workshop.script(f"echo '[  7%] one'; echo '[100%] all'; {DONE}")
    workshop.build()
    assert workshop.percents() == [7, 100]


def test_an_interrupted_build_goes_on_where_it_stopped(workshop: Workshop) -> None:
    workshop.script("touch one; echo '[1/4] one'; exec sleep 600")

    def interrupt(step: Step) -> None:
        if step.percent is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.build(on_step=interrupt)
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]
    assert build.is_interrupted(workshop.directory)
    # The second start counts only the three steps that are left.
    workshop.script(
        "test -e one || exit 9; echo '[0/2] Re-checking globbed directories...';"
        f"echo '[1/3] two'; echo '[3/3] link'; {DONE}"
    )
    workshop.steps.clear()
    workshop.build()
    assert workshop.unpacked == 1
    assert [step.name for step in workshop.steps] == ["compile", "compile"]
    assert workshop.percents() == [50, 100]


def test_other_options_begin_anew(workshop: Workshop) -> None:
    workshop.script(f"test -e one && exit 9; touch one; {DONE}")
    workshop.build()
    workshop.build(("-DOTHER=1",))
    assert workshop.unpacked == 2


def test_a_failure_says_the_last_lines_and_what_to_do(workshop: Workshop) -> None:
    workshop.script("seq 1 100; echo 'error: no such thing' >&2; exit 2")
    with pytest.raises(MeshError) as caught:
        workshop.build()
    error = caught.value
    assert error.code == "accelerator_build_failed"
    assert error.message.endswith("100\nerror: no such thing")
    assert str(workshop.log) in error.hint
    assert workshop.log.read_text().count("\n") > 100


def test_a_build_that_makes_no_library_has_failed(workshop: Workshop) -> None:
    workshop.script("true")
    with pytest.raises(MeshError, match="ended without a library"):
        workshop.build()


def test_compilers_have_the_lowest_priority(workshop: Workshop) -> None:
    # Until this process has set it: a child starts with its parent's.
    workshop.script(f"until [ $(nice) = 19 ]; do :; done; sh -c 'nice > nice'; {DONE}")
    workshop.build()
    assert (workshop.directory / "build" / "nice").read_text() == "19\n"


def test_one_that_ignores_the_interrupt_is_killed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_END_SECONDS", 0.2)
    workshop.script("trap '' INT; echo '[1/4] one'; while :; do sleep 1; done")

    def interrupt(step: Step) -> None:
        if step.percent is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.build(on_step=interrupt)
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(("seconds", "text"), [(0, "1 second"), (45, "45 seconds"), (150, "2 minutes")])
def test_times_for_people(seconds: int, text: str) -> None:
    assert build.duration(seconds) == text
