"""A prebuilt engine from an index on loopback: a real wheel is installed, tested and used; what lies is refused."""

import asyncio
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from tests.integration.accelerator_fixtures import NO_FAULT, WRONG_OPERATOR, StandIn, llvmpipe, stand_in
from tests.integration.engine_fixtures import client_of, embedded, rpc_embedded, small_spec, started, supervisor
from tests.support.wheel_index import Answer, WheelIndex, engine_files, metadata, small_files, wheel_name, write_wheel

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import prebuilt, selftest
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.index import MAX_PAGE_BYTES, VARIABLE, Index, Wheel
from mesh_llm.engine.accelerators.install_main import OFFER, InstallStep, install_command
from mesh_llm.engine.installation import Part, record_part
from mesh_llm.engine.process import run
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.loading import VULKAN
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import DeviceKind
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.library.library import require_builtin

__all__ = ["embedded", "llvmpipe", "rpc_embedded", "stand_in", "supervisor"]

LOCAL = f"{VERSION}+vulkan"
RealWheel = Callable[[Path | None], Path]


@pytest.fixture
def index() -> Iterator[WheelIndex]:
    with WheelIndex() as server:
        yield server


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory: pytest.TempPathFactory) -> RealWheel:
    """The installed engine as a wheel, with an accelerator's plugin in it."""
    made: dict[Path | None, Path] = {}

    def make(library: Path | None) -> Path:
        if library not in made:
            files = engine_files()
            if library is not None:
                files[f"{PACKAGE}/libggml-vulkan.so"] = library
            made[library] = write_wheel(tmp_path_factory.mktemp("wheel") / wheel_name(LOCAL), files)
        return made[library]

    return make


class Home:
    """A home where a prebuilt engine is installed."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.directory = cache / "engine" / plugin.key()
        self.directory.mkdir(parents=True)
        self.steps: list[Step] = []

    def find(self, index: WheelIndex, agree: prebuilt.Agree | None = None, sha256: str = "") -> Wheel:
        return prebuilt.find(Index(address=index.address, sha256=sha256), VULKAN, None, agree)

    def install(self, wheel: Wheel, model: Path | None = None) -> Part:
        part = prebuilt.install(self.cache, self.directory, wheel, None, model, self.steps.append)
        record_part(self.directory, VERSION, part)
        return part

    def left(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def source(self) -> EmbeddedSource:
        source = EmbeddedSource.find(self.cache)
        assert source is not None
        return source


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "cache")


async def test_a_real_wheel_is_installed_and_used(
    index: WheelIndex,
    home: Home,
    real_wheel: RealWheel,
    stand_in: StandIn,
    rpc_embedded: EmbeddedSource,
    supervisor: Supervisor,
) -> None:
    index.add("vulkan", real_wheel(stand_in(NO_FAULT)), as_json=True)
    # A build for the processor, another release, and another system are in the same index.
    for other in (wheel_name("2026.10.11548+vulkan"), wheel_name(LOCAL, "cp310-abi3-win_amd64"), wheel_name()):
        small = write_wheel(home.cache / other, small_files())
        index.add("", small)
    wheel = home.find(index)
    assert (wheel.filename, wheel.index) == (wheel_name(LOCAL), f"{index.address}/vulkan")
    before = list(sys.path)
    part = await asyncio.to_thread(home.install, wheel, require_builtin("tiny"))
    assert part.tested == "tested on StandIn0: 20 operators, 24 tokens of text, RPC 8.0.0"
    assert wheel.sha256 in part.how
    assert home.left() == ["installation.json", part.file]
    percents = [step.percent for step in home.steps if step.percent is not None]
    assert percents == sorted(percents)

    info = await home.source().info()
    assert [one.id for one in info.devices if one.kind is DeviceKind.GPU] == ["StandIn0"]
    assert (info.version, info.rpc_version, info.problems) == (VERSION, plugin.RPC_VERSION, ())
    engine = await started(supervisor, home.source(), small_spec(require_builtin("tiny"), slots=1), "s")
    answer = (await client_of(engine).post("/v1/completions", {"prompt": "Once", "max_tokens": 5})).expect().json()
    assert answer["usage"]["completion_tokens"] == 5
    used = loaded(engine.pid)
    assert f"{home.directory / part.file}/{PACKAGE}/{PACKAGE}.abi3.so" in used
    assert f"{home.directory / part.file}/{PACKAGE}/libggml-vulkan.so" in used
    assert str(home.source().path) not in used
    # This process, as the daemon, uses nothing of it.
    assert sys.path == before
    assert str(home.directory) not in loaded(os.getpid())


def loaded(pid: int) -> str:
    """What a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.timeout(600)
async def test_a_real_wheel_with_vulkan_computes_on_llvmpipe(
    index: WheelIndex, home: Home, real_wheel: RealWheel, llvmpipe: Path
) -> None:
    index.add("", real_wheel(llvmpipe))
    part = await asyncio.to_thread(home.install, home.find(index), require_builtin("tiny"))
    assert part.tested.startswith("tested on Vulkan0: 20 operators")
    info = await home.source().info()
    assert [one.id for one in info.devices if "llvmpipe" in one.name] == ["Vulkan0"]


@pytest.mark.parametrize(
    ("fault", "code", "why"),
    [
        (WRONG_OPERATOR, selftest.CODE, "wrong results: ROPE on StandIn0"),
        (None, selftest.NO_DEVICE, "finds no GPU that it can use with Vulkan"),
    ],
)
def test_one_that_fails_its_test_leaves_nothing(
    index: WheelIndex, home: Home, real_wheel: RealWheel, stand_in: StandIn, fault: int | None, code: str, why: str
) -> None:
    index.add("vulkan", real_wheel(None if fault is None else stand_in(fault)))
    with pytest.raises(MeshError, match=why) as caught:
        home.install(home.find(index))
    assert caught.value.code == code
    assert home.left() == []


def test_one_that_cannot_be_loaded_is_refused(index: WheelIndex, home: Home) -> None:
    index.add("vulkan", write_wheel(home.cache / wheel_name(), small_files()))
    with pytest.raises(MeshError, match="it does not start here") as caught:
        home.install(home.find(index))
    assert caught.value.code == "wheel_wrong"
    assert home.left() == []


def test_another_release_by_the_name_of_the_right_one_is_refused(
    index: WheelIndex, home: Home, stand_in: StandIn
) -> None:
    files = engine_files() | {f"{PACKAGE}/libggml-vulkan.so": stand_in(NO_FAULT)}
    files[f"{PACKAGE}/_version.py"] = engine_version().replace(VERSION.encode(), b"2026.10.11548")
    index.add("vulkan", write_wheel(home.cache / wheel_name(), files))
    with pytest.raises(MeshError, match=r"it is xllamacpp 2026\.10\.11548, and .* is needed"):
        home.install(home.find(index))
    index.answers.clear()
    files[f"{PACKAGE}-{VERSION}.dist-info/METADATA"] = metadata("2026.10.11548")
    index.add("vulkan", write_wheel(home.cache / wheel_name(LOCAL), files))
    with pytest.raises(MeshError, match=r"it contains xllamacpp 2026\.10\.11548"):
        home.install(home.find(index))


def engine_version() -> bytes:
    path = importlib.metadata.distribution(PACKAGE).locate_file(f"{PACKAGE}/_version.py")
    return Path(str(path)).read_bytes()


async def test_a_node_asks_the_index_that_was_set_for_it(
    index: WheelIndex, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_wheel(home.cache / wheel_name(), small_files())
    index.add("vulkan", path)
    monkeypatch.setenv(VARIABLE, index.address)
    argv, env = install_command(home.cache, VULKAN, "--offer")
    done = await run(argv, env, 120)
    step = msgspec.json.decode(done.stdout, type=InstallStep)
    assert (step.step, step.download) == (OFFER, path.stat().st_size)
    assert path.name in step.text


# The download


def small(home: Home) -> Path:
    """A wheel of some blocks that is refused only after it has arrived whole."""
    files = small_files() | {f"{PACKAGE}/data.bin": os.urandom(6 << 20)}
    return write_wheel(home.cache / wheel_name(), files)


def arrives(home: Home, wheel: Wheel) -> None:
    with pytest.raises(MeshError, match="it does not start here"):
        home.install(wheel)


def test_a_broken_connection_is_continued(index: WheelIndex, home: Home) -> None:
    answer = index.add("vulkan", small(home))
    answer.cut_after, answer.cuts = 1_500_000, 2
    arrives(home, home.find(index))
    assert answer.cuts == 0


def test_an_interrupted_download_goes_on(index: WheelIndex, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "_TELL_SECONDS", 0.0)
    monkeypatch.setattr(prebuilt, "_CONNECTIONS", 1)
    index.add("vulkan", small(home))
    wheel = home.find(index)
    index.seen.clear()

    def interrupt(step: Step) -> None:
        if (step.percent or 0) >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prebuilt.install(home.cache, home.directory, wheel, None, None, interrupt)
    assert any(name.endswith(".partial") for name in home.left())
    index.seen.clear()
    arrives(home, wheel)
    begins = [int(one.removeprefix("bytes=").partition("-")[0]) for one in index.requested(wheel.filename)]
    assert begins
    assert min(begins) >= 2 << 20, "the first blocks are there"


def test_a_server_without_parts_will_do(index: WheelIndex, home: Home) -> None:
    index.add("vulkan", small(home)).ranges = False
    arrives(home, home.find(index))


def test_another_content_than_announced_is_refused(index: WheelIndex, home: Home) -> None:
    index.add("vulkan", small(home), sha256="ab" * 32)
    with pytest.raises(MeshError, match="arrived twice with other content") as caught:
        home.install(home.find(index))
    assert caught.value.code == "download_corrupt"
    assert home.left() == []


def test_a_page_instead_of_a_wheel_is_refused(index: WheelIndex, home: Home) -> None:
    answer = index.add("vulkan", small(home))
    answer.body, answer.kind = b"<html>Please log in</html>", "text/html"
    with pytest.raises(MeshError, match="is not a wheel: it begins with b'<htm'"):
        home.install(home.find(index))


def test_without_a_digest_the_user_decides(index: WheelIndex, home: Home) -> None:
    path = small(home)
    index.add("vulkan", path, sha256="")
    with pytest.raises(MeshError, match="gives no SHA-256") as caught:
        home.find(index)
    assert caught.value.code == "index_unhashed"
    assert "--sha256" in caught.value.hint
    asked: list[Wheel] = []
    with pytest.raises(MeshError):
        home.find(index, lambda wheel: bool(asked.append(wheel)))
    assert [wheel.size for wheel in asked] == [path.stat().st_size]
    arrives(home, home.find(index, lambda _: True))
    with pytest.raises(MeshError) as caught:
        home.install(home.find(index, sha256="cd" * 32))
    assert caught.value.code == "download_corrupt"


def test_a_digest_over_an_open_connection_says_nothing(
    index: WheelIndex, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add("vulkan", small(home))

    def open_to_all(_: str) -> bool:
        return False

    monkeypatch.setattr(prebuilt, "is_private", open_to_all)
    with pytest.raises(MeshError) as caught:
        home.find(index)
    assert caught.value.code == "index_unhashed"


# Indexes that lie


def refused(index: WheelIndex, home: Home, code: str, why: str) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        home.install(home.find(index))
    assert caught.value.code == code
    assert home.left() == []


PAGE = f"/whl/{PACKAGE}/"


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        (Answer(b"<html>Please log in</html>"), "index_unreadable", "a page without links"),
        (Answer(b"{", "application/json"), "index_unreadable", "its JSON cannot be read"),
        (Answer(b"x" * (MAX_PAGE_BYTES + 1)), "index_unreadable", "longer than 16 MB"),
        (Answer(status=500), "index_unreachable", "it answers 500"),
        (Answer(b"x" * 100_000, cut_after=10), "index_unreachable", "cannot be fetched"),
        (Answer(location="file:///etc/passwd"), "index_unreadable", "not on the web"),
        (Answer(location="http://169.254.169.254/latest"), "index_unreadable", "without encryption"),
        (Answer(location="https://other.invalid/whl/"), "index_unreadable", "if you trust that one, name it"),
        (Answer(location="http://[::1/"), "index_unreadable", "not on the web"),
        (Answer(location=PAGE), "index_unreadable", "redirected again and again"),
        (Answer(b"<a href='/x.tar.gz'>x</a>"), "index_without_wheel", "has no wheel of"),
    ],
)
def test_an_index_that_is_none_is_refused(index: WheelIndex, home: Home, answer: Answer, code: str, why: str) -> None:
    index.answers[PAGE] = answer
    refused(index, home, code, why)


def test_where_no_folder_has_it_the_nearest_says_why(index: WheelIndex, home: Home) -> None:
    refused(index, home, "index_without_wheel", f"{index.address} has no page of {PACKAGE}")
    index.add("", write_wheel(home.cache / wheel_name("1.0"), small_files()))
    index.add("vulkan", write_wheel(home.cache / wheel_name(tags="cp310-abi3-win_amd64"), small_files()))
    refused(
        index, home, "index_without_wheel", f"{index.address}/vulkan has builds for vulkan, but none for this system"
    )


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        (Answer(status=404), "index_unreachable", "it answers 404"),
        (Answer(location="file:///etc/passwd"), "index_unreadable", "not on the web"),
        (Answer(location="http://192.0.2.1/x.whl"), "index_unreadable", "without encryption"),
        (Answer(b"x", sized=False, ranges=False), "index_unreadable", "does not say how large"),
        (Answer(b"", ranges=False), "index_unreadable", "0 bytes is no size"),
    ],
)
def test_a_wheel_that_is_none_is_refused(index: WheelIndex, home: Home, answer: Answer, code: str, why: str) -> None:
    path = small(home)
    index.add("vulkan", path)
    index.answers[f"/files/{path.name}"] = answer
    refused(index, home, code, why)


def test_nobody_at_the_address_is_a_sentence(home: Home) -> None:
    with WheelIndex() as gone:
        pass
    with pytest.raises(MeshError) as caught:
        home.find(gone)
    assert caught.value.code == "index_unreachable"
    assert "cannot be fetched" in caught.value.message


def test_the_wheel_may_lie_elsewhere(index: WheelIndex, home: Home) -> None:
    path = small(home)
    index.add("vulkan", path)
    with WheelIndex() as other:
        other.answers[f"/{path.name}"] = index.answers[f"/files/{path.name}"]
        index.answers[f"/files/{path.name}"] = Answer(location=f"{other.address.removesuffix('/whl')}/{path.name}")
        arrives(home, home.find(index))
