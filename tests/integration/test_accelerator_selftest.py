"""The self-test of accelerators in real processes: what is right passes; a crash, a hang, a wrong result do not."""

from pathlib import Path

import pytest
from tests.integration.accelerator_fixtures import (
    CRASH_AT_LOAD,
    CRASH_AT_OPERATOR,
    HANG,
    NO_FAULT,
    WRONG_MODEL,
    WRONG_OPERATOR,
    StandIn,
    installed,
    stand_in,
)

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import selftest
from mesh_llm.engine.accelerators.selftest import self_test
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import DeviceKind
from mesh_llm.models.library.library import require_builtin

__all__ = ["stand_in"]


def test_one_that_computes_right_passes(stand_in: StandIn) -> None:
    said: list[str] = []
    found = self_test(stand_in(NO_FAULT), require_builtin("tiny"), said.append)
    assert found.devices == ("StandIn0",)
    assert found.operators == 20
    assert found.tokens == 24
    assert len(said) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (CRASH_AT_LOAD, r"it crashes when it is loaded \(SIGABRT\)"),
        (CRASH_AT_OPERATOR, r"it crashes at MUL_MAT f16 on StandIn0 \(SIGABRT\)"),
        (WRONG_OPERATOR, "it computes wrong results: ROPE on StandIn0, ROPE neox on StandIn0"),
        (WRONG_MODEL, "its text differs from the processor's at token 1"),
    ],
)
def test_a_broken_one_is_caught(stand_in: StandIn, fault: int, reason: str) -> None:
    with pytest.raises(MeshError, match=reason) as caught:
        self_test(stand_in(fault), require_builtin("tiny"), lambda _: None)
    assert caught.value.code == selftest.CODE


def test_one_that_hangs_is_caught(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough to load the engine, and it hangs at the first operator.
    monkeypatch.setattr(selftest, "OPERATOR_SECONDS", 20.0)
    with pytest.raises(MeshError, match="it hangs at MUL_MAT f16 on StandIn0"):
        self_test(stand_in(HANG), None, lambda _: None)


def test_what_is_no_library_is_caught(tmp_path: Path) -> None:
    library = tmp_path / "libggml-vulkan.so"
    library.write_bytes(b"\x7fELF, and nothing more")
    with pytest.raises(MeshError, match="it fails when it is loaded"):
        self_test(library, None, lambda _: None)


async def test_the_engine_lists_the_devices_of_the_installed_plugin(stand_in: StandIn, tmp_path: Path) -> None:
    installed(tmp_path, stand_in(NO_FAULT))
    source = EmbeddedSource.find(tmp_path)
    assert source is not None
    info = await source.info()
    assert info.has_gpu
    assert [(one.id, one.kind) for one in info.devices if one.kind is DeviceKind.GPU] == [("StandIn0", DeviceKind.GPU)]
    assert "vulkan" in {part.name for part in info.parts}


async def test_a_plugin_that_crashes_the_engine_later_is_left_out(stand_in: StandIn, tmp_path: Path) -> None:
    path = installed(tmp_path, stand_in(CRASH_AT_LOAD))
    source = EmbeddedSource.find(tmp_path)
    assert source is not None
    info = await source.info()
    assert info.usable
    assert not info.has_gpu
    assert any(f"does not start with {path}, so the processor serves" in problem for problem in info.problems)
