"""Ordinary answers of the real engine: its own are read back whole, those of other weights are not."""

import dataclasses
from pathlib import Path

from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import FakeEngines, local, running_api
from tests.support.gguf_models import PRESETS, write_model

from mesh_llm.api.canary_shapes import CHAT, Question, RequestShape
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.canaries import SUSPECT, Suspicion, judged, noise_of
from mesh_llm.core.trust.canary_plan import CANARY_TOKENS
from mesh_llm.core.trust.readback import Reading
from mesh_llm.core.types.ids import ModelName
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import RunningEngine, Supervisor

__all__ = ["embedded", "model", "supervisor"]

NOISE = noise_of("Q8_0", "f16", "f16")
SMALL = ModelName("small")
SHAPE = RequestShape(path=CHAT, fields=(("model", None), ("messages", None), ("stream", b"true"), ("top_k", b"20")))


def never() -> bool:
    return False


async def test_answers_of_the_file_are_told_from_those_of_other_weights(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    false = tmp_path / "false.gguf"
    write_model(false, dataclasses.replace(PRESETS["small"], seed=99))
    engines = [
        await started(supervisor, embedded, small_spec(path, threads=threads), name)
        for path, name, threads in ((model("small"), "true", 1), (model("small"), "honest", 2), (false, "liar", 1))
    ]
    copy, honest, liar = (_target(engine) for engine in engines)
    keys = {engine.info.address: engine.info.key for engine in engines if engine.info is not None}
    async with running_api() as api:
        api.server.use_engines(_Keys(keys=keys))
        client = api.server.canaries
        suspicions = {honest.address: Suspicion(), liar.address: Suspicion()}
        misfits = 0
        for number in range(8):
            asked = Question(SMALL, CHAT, "You are a gardener.", f"What grows in week {number}?")
            reference = await client.reference(copy, asked, never)
            assert reference is not None
            for host in (honest, liar):
                answer = await client.ask(host, SHAPE, asked, never)
                assert answer is not None
                suspicions[host.address] = judged(suspicions[host.address], reference, answer, NOISE)
            pieces = await client.ask_ordinarily(honest, SHAPE, asked, never)
            assert pieces is not None
            assert await client.read_back(copy, asked, pieces, never) == Reading(CANARY_TOKENS)
            # What this model never says after the prompt: its own words in another order.
            turned = await client.read_back(copy, asked, pieces[::-1], never)
            assert turned is not None
            misfits += turned.misfit
        assert suspicions[honest.address].evidence < 0
        assert suspicions[liar.address].evidence >= SUSPECT
        assert misfits > 0


@dataclasses.dataclass
class _Keys(FakeEngines):
    """Engines that each demand a key of its own."""

    keys: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def key_of(self, address: str) -> str:
        return self.keys[address]


def _target(engine: RunningEngine) -> Target:
    assert engine.info is not None
    return local(engine.info.address)
