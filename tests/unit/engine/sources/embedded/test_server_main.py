import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh_llm.engine.sources.embedded import server_main
from mesh_llm.engine.sources.embedded.ggml import Device, Ggml, GgmlError
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, EngineSpec

SPEC = EngineSpec(model=Path("/m.gguf"), alias="m", context=1000, slots=4)


class FakeGgml:
    def devices(self) -> list[tuple[Device, DeviceInfo]]:
        return [(Device(1), DeviceInfo(id="CPU", name="x", kind=DeviceKind.CPU))]

    def buffer_type(self, device: Device) -> str:
        return f"buffer of {device}"


def params_of(spec: EngineSpec) -> Any:
    return server_main.common_params(spec, cast("Ggml", FakeGgml()))


@pytest.fixture(autouse=True)
def wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def common_params() -> SimpleNamespace:
        draft = SimpleNamespace(mparams=SimpleNamespace(), devices="")
        return SimpleNamespace(
            model=SimpleNamespace(),
            mmproj=SimpleNamespace(),
            cpuparams=SimpleNamespace(),
            speculative=SimpleNamespace(draft=draft),
        )

    fake = SimpleNamespace(
        CommonParams=common_params,
        ggml_type=SimpleNamespace(GGML_TYPE_F16=1, GGML_TYPE_Q8_0=8),
        llama_pooling_type=SimpleNamespace(LLAMA_POOLING_TYPE_MEAN="mean"),
        common_speculative_type=SimpleNamespace(COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE="simple"),
    )
    monkeypatch.setattr(server_main, "wheel", lambda: fake)


def test_a_plain_server_is_on_loopback_and_offers_what_the_api_server_needs() -> None:
    params = params_of(SPEC)
    assert params.hostnames == ["127.0.0.1"]
    assert params.port == 0
    assert (params.n_ctx, params.n_parallel) == (4000, 4)
    assert params.model_alias == {"m"}
    assert params.endpoint_metrics
    assert params.endpoint_slots
    assert params.use_jinja
    assert params.pooling_type == "mean"
    assert not params.fit_params
    assert not params.ui
    assert not hasattr(params, "sleep_idle_seconds")
    assert not hasattr(params, "slot_save_path")
    assert not hasattr(params, "endpoint_props")


def test_a_split_pads_the_shares_and_keeps_output_and_draft_here() -> None:
    split = replace(
        SPEC,
        rpc=("127.0.0.1:1", "127.0.0.1:2"),
        tensor_split=(3.0, 1.0),
        gpu_layers=7,
        output_on_host=True,
        draft=Path("/d.gguf"),
        draft_max=9,
        cache_type="q8_0",
    )
    params = params_of(split)
    assert params.tensor_split == [3.0, 1.0] + [0.0] * 126
    assert params.n_gpu_layers == 7
    assert params.tensor_buft_overrides == "^output=buffer of 1,^token_embd=CPU"
    assert (params.cache_type_k, params.cache_type_v) == (8, 8)
    assert params.speculative.types == ["simple"]
    assert params.speculative.draft.mparams.path == "/d.gguf"
    assert params.speculative.draft.n_max == 9
    assert params.speculative.draft.devices == "none"


def test_experts_in_main_memory() -> None:
    params = params_of(replace(SPEC, gpu_layers=32, cpu_moe=2))
    assert params.n_gpu_layers == 32
    (name, _, memory) = params.tensor_buft_overrides.partition("=")
    assert memory == "CPU"
    moved = ["blk.0.ffn_up_exps.weight", "blk.1.ffn_gate_up_exps.weight", "blk.1.ffn_down_chexps.weight"]
    kept = ["blk.2.ffn_up_exps.weight", "blk.10.ffn_up_exps.weight", "blk.0.ffn_up.weight", "blk.1.ffn_gate_inp.weight"]
    assert [one for one in (*moved, *kept) if re.search(name, one)] == moved


def test_layers() -> None:
    assert params_of(SPEC).n_gpu_layers == 999
    assert params_of(replace(SPEC, devices=("CPU",))).n_gpu_layers == 0
    # The workers' layers are not on the CPU even when this machine has nothing else.
    assert params_of(replace(SPEC, devices=("CPU",), rpc=("127.0.0.1:1",))).n_gpu_layers == 999


def test_an_output_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(GgmlError, match="Metal"):
        params_of(replace(SPEC, output_on_host=True, devices=("Metal",)))
