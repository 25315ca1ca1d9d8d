from dataclasses import replace
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec

SPEC = EngineSpec(
    model=Path("/models/a b.gguf"),
    alias="a",
    context=4096,
    slots=3,
    draft=Path("/models/d.gguf"),
    devices=("CUDA0", "CUDA1"),
    rpc=("127.0.0.1:5001",),
    tensor_split=(3.0, 1.0),
    threads=2,
)


def test_survives_a_command_line() -> None:
    assert EngineSpec.from_json(SPEC.to_json()) == SPEC
    worker = RpcWorkerSpec(port=5001, devices=("CUDA0",), threads=4)
    assert RpcWorkerSpec.from_json(worker.to_json()) == worker
    assert "\n" not in SPEC.to_json()


def test_context_is_per_slot() -> None:
    assert SPEC.total_context == 3 * 4096


@pytest.mark.parametrize("endpoint", ["192.168.1.2:5001", "0.0.0.0:5001", "localhost:5001", "127.0.0.11:5001"])
def test_refuses_rpc_servers_that_are_not_on_loopback(endpoint: str) -> None:
    with pytest.raises(MeshError) as caught:
        replace(SPEC, rpc=(endpoint,))
    assert caught.value.code == "engine_spec_invalid"
    assert endpoint in caught.value.message


def test_refuses_what_llama_cpp_would_crash_on() -> None:
    for wrong in ({"context": 0}, {"slots": 0}, {"cache_type": "f8"}):
        with pytest.raises(MeshError):
            replace(SPEC, **wrong)


def test_output_stays_on_the_first_local_device() -> None:
    assert SPEC.output_device == "CUDA0"
    assert replace(SPEC, devices=()).output_device == "CPU"
    assert replace(SPEC, devices=("CPU",)).uses_cpu_only


def test_slots_divide_the_micro_batch_where_embeddings_are_pooled() -> None:
    for slots in range(1, 40):
        size = replace(SPEC, slots=slots, micro_batch=512).even_micro_batch
        assert size % slots == 0
        assert 512 - slots < size <= 512
    assert replace(SPEC, slots=3, pooling="").even_micro_batch == 512
    assert replace(SPEC, slots=3, embeddings=False).even_micro_batch == 512
