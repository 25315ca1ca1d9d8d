"""`mesh-llm engine install` and `remove`: what they print, with a GPU, without one, and when interrupted."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mesh_llm.cli import engine
from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.index import UNHASHED, Index, Wheel
from mesh_llm.engine.accelerators.installation import Offer
from mesh_llm.engine.accelerators.recipe import Examined
from mesh_llm.engine.installation import Part

OFFER = Offer(kind="vulkan", card=None, examined=Examined(), download=38_000_000, seconds=150)
PART = Part(name="vulkan", file="x.so", sha256="", tested="tested on Vulkan0")


class Installation:
    """Stands for the packages that build."""

    def __init__(self) -> None:
        self.rpc: list[bool] = []
        self.with_slots: list[bool] = []
        self.installed: list[tuple[str, bool]] = []
        self.offered: Offer | MeshError = OFFER
        self.interrupted = False
        self.index: Index | None = None

    def slots(self, _: Path, progress: object, archive: Path | None, *, force: bool) -> None:
        self.with_slots.append(force)

    def plugin(self, _: Path, progress: object, archive: Path | None, force: bool) -> None:
        self.rpc.append(force)

    def offer(self, _: Path, gpu: str, force: bool, index: Index | None, agree: object) -> Offer:
        assert agree is None, "nobody can be asked without a terminal"
        self.index = index
        if isinstance(self.offered, MeshError):
            raise self.offered
        return self.offered

    def install(self, _: Path, wanted: Offer, progress: object, force: bool, **__: object) -> Part:
        self.installed.append((wanted.kind, force))
        if callable(progress):
            for percent in (0, 4, 9, 12, 40):
                progress(Step(kind="vulkan", name="compile", text=f"Compiling: {percent} %.", percent=percent))
            if self.interrupted:
                raise KeyboardInterrupt
            progress(Step(kind="vulkan", name="done", text="It is ready."))
        return PART

    def remove(self, _: Path, kind: str) -> bool:
        return kind == "vulkan"


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installation:
    made = Installation()
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.setattr(engine.plugin, "install", made.plugin)
    monkeypatch.setattr(engine.slot_library, "install", made.slots)
    replaced = SimpleNamespace(offer=made.offer, install=made.install, remove=made.remove)
    monkeypatch.setattr(engine, "accelerators", replaced)
    return made


def ran(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(engine.engine, list(arguments))
    return done.exit_code, done.output


def test_it_shows_the_offer_and_a_line_for_each_tenth(installation: Installation) -> None:
    code, text = ran("install")
    assert code == 0
    assert text.splitlines() == [
        OFFER.text,
        "compile: Compiling: 0 %.",
        "compile: Compiling: 12 %.",
        "compile: Compiling: 40 %.",
        "done: It is ready.",
    ]
    assert "38 MB to download, then about 2 minutes" in OFFER.text
    assert installation.rpc == [False]


def test_none_builds_the_rpc_plugin_alone(installation: Installation) -> None:
    assert ran("install", "--gpu", "none", "--force") == (0, "")
    assert (installation.rpc, installation.with_slots, installation.installed) == ([True], [True], [])


def test_force_with_a_kind_is_about_that_kind(installation: Installation) -> None:
    assert ran("install", "--gpu", "vulkan", "--force")[0] == 0
    assert (installation.rpc, installation.installed) == ([False], [("vulkan", True)])


def test_a_machine_without_a_gpu_is_no_failure_unless_a_kind_was_asked_for(installation: Installation) -> None:
    installation.offered = MeshError(code="no_gpu", message="No GPU.", hint="")
    assert ran("install") == (0, "No GPU was found: models run on the processor.\n")
    assert ran("install", "--gpu", "cuda")[0] != 0


def test_what_is_ready_is_not_built(installation: Installation) -> None:
    installation.offered = Offer(kind="vulkan", card=None, examined=Examined(), download=0, seconds=0, ready=True)
    code, text = ran("install")
    assert code == 0
    assert text.splitlines()[-1] == "The vulkan plugin is installed (tested on Vulkan0)."


def test_ctrl_c_says_how_to_go_on(installation: Installation) -> None:
    installation.interrupted = True
    code, text = ran("install")
    assert code == 130
    assert text.splitlines()[-1] == "Interrupted. `mesh-llm engine install` goes on where it stopped."


def test_a_prebuilt_engine_is_shown_and_why_there_is_none(installation: Installation) -> None:
    wheel = Wheel(
        kind="vulkan", flavour="vulkan", filename="x.whl", url="https://h.example/x", index="", size=5_000_000
    )
    installation.offered = replace(OFFER, wheel=wheel)
    code, text = ran("install")
    assert code == 0
    assert text.splitlines()[0] == "A prebuilt engine with Vulkan for this machine: x.whl, 5.0 MB, from h.example."
    gone = MeshError(code="index_unreachable", message="The index cannot be fetched.", hint="Check the network.")
    installation.offered = replace(OFFER, refused=gone)
    assert ran("install")[1].splitlines()[:2] == ["The index cannot be fetched. It is built here instead.", OFFER.text]
    unproven = MeshError(code=UNHASHED, message="There is no SHA-256.", hint="Give it.")
    installation.offered = replace(OFFER, refused=unproven)
    assert ran("install")[1].splitlines()[0] == "There is no SHA-256. It is built here instead. Give it."


def test_which_index_is_asked(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    ran("install", "--index", "https://h.example/whl", "--sha256", "ab" * 32)
    assert installation.index == Index(address="https://h.example/whl", sha256="ab" * 32, strict=True)
    ran("install")
    assert installation.index == Index()
    monkeypatch.setenv("MESH_LLM_ENGINE_INDEX", "https://env.example")
    ran("install")
    assert installation.index == Index(address="https://env.example")
    ran("install", "--index", "none")
    assert installation.index is None
    assert ran("install", "--index", "ftp://h.example")[0] != 0
    assert ran("install", "--sha256", "short")[0] != 0


def test_remove_says_what_it_did(installation: Installation) -> None:
    assert "is removed" in ran("remove", "vulkan")[1]
    assert ran("remove", "cuda") == (0, "There is no cuda plugin that was built here.\n")
    assert ran("remove", "nonsense")[0] == 2
