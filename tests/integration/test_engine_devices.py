"""With several cards, the embedded engine uses those that its spec names, and leaves the others alone.

The cards are two stand-ins (tests/support/stand_in_gpu.cpp). The first one ends any process that uses it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.accelerator_fixtures import TWO_DEVICES, StandIn, installed, stand_in
from tests.integration.engine_fixtures import client_of, small_spec, started, supervisor

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Exit, Supervisor
from mesh_llm.models.library.library import require_builtin

__all__ = ["stand_in", "supervisor"]

KEEP = """
import os, sys
from pathlib import Path
from mesh_llm.engine.sources.embedded.ggml import Ggml
ggml = Ggml()
ggml.load_accelerators([Path(sys.argv[1])])
ggml.keep_devices(tuple(sys.argv[2:]))
print(*(info.id for _, info in ggml.devices()), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("named", "left"),
    [
        (("StandIn0", "StandIn1"), {"StandIn0", "StandIn1", "CPU"}),
        (("StandIn1",), {"StandIn1", "CPU"}),
        (("CPU",), {"CPU"}),
    ],
)
def test_what_is_not_named_is_not_there_for_the_engine(
    stand_in: StandIn, named: tuple[str, ...], left: set[str]
) -> None:
    assert set(_kept(stand_in, *named)) == left


def test_the_order_is_as_named(stand_in: StandIn) -> None:
    cards = [one for one in _kept(stand_in, "StandIn1", "StandIn0") if one != "CPU"]
    assert cards == ["StandIn1", "StandIn0"]


async def test_a_card_that_is_not_named_is_not_touched(
    stand_in: StandIn, supervisor: Supervisor, tmp_path: Path
) -> None:
    installed(tmp_path, stand_in(TWO_DEVICES))
    source = EmbeddedSource.find(tmp_path)
    assert source is not None
    model = require_builtin("tiny")
    engine = await started(supervisor, source, small_spec(model, devices=("StandIn1",)), "second")
    answer = await client_of(engine).post("/v1/completions", {"prompt": "Once", "max_tokens": 4})
    assert answer.expect().json()["choices"][0]["text"]
    await engine.stop()
    for devices in ((), ("StandIn0",), ("StandIn0", "StandIn1")):
        command = await supervisor.server_command(source, small_spec(model, devices=devices))
        first = await supervisor.launch(command, "first")
        assert isinstance(await first.ready(), Exit), devices


async def test_a_card_that_is_gone_is_named(stand_in: StandIn, supervisor: Supervisor, tmp_path: Path) -> None:
    installed(tmp_path, stand_in(TWO_DEVICES))
    source = EmbeddedSource.find(tmp_path)
    assert source is not None
    spec = small_spec(require_builtin("tiny"), devices=("StandIn2",))
    engine = await supervisor.launch(await supervisor.server_command(source, spec), "gone")
    ended = await engine.ready()
    assert isinstance(ended, Exit)
    assert "there is no device StandIn2; there are " in ended.reason


def _kept(stand_in: StandIn, *named: str) -> list[str]:
    command = (sys.executable, "-c", KEEP, str(stand_in(TWO_DEVICES)), *named)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()
