"""A plan as text."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from tests.support.gguf_writer import header, llama_metadata, llama_tensors

from mesh_llm.cli.plan import plan, render
from mesh_llm.core.performance.plan import (
    PlanAnswer,
    PlanMachine,
    PlanMemory,
    PlanNode,
    PlanOffload,
    PlanPrompt,
    PlanSplit,
)
from mesh_llm.core.types.errors import MeshError

HERE = PlanNode(node_id="a" * 64, name="desk", layers=10, ratio=0.6, memory_bytes=7_000_000_000)
THERE = PlanNode(node_id="b" * 64, name="lap", layers=6, ratio=0.4, memory_bytes=5_000_000_000, rtt_ms=4.0)
SPLIT = PlanSplit(nodes=(HERE, THERE), context=4096, slots=1, predicted_tps=7.25, ring_ms=4.0)
MACHINES = (
    PlanMachine(node_id="a" * 64, name="desk", memory_bytes=8_000_000_000, gigabytes_per_second=12.5),
    PlanMachine(
        node_id="b" * 64, name="lap", memory_bytes=6_000_000_000, rtt_ms=4.0, megabytes_per_second=90.0, has_file=False,
        note="its engine cannot share models",
    ),
)  # fmt: skip


def test_a_split_is_told_with_its_parts_and_its_speed() -> None:
    text = render(
        PlanAnswer(
            model="big",
            runs="split",
            message="big fits 2 together.",
            context=4096,
            slots=1,
            need_bytes=12 * 10**9,
            have_bytes=14 * 10**9,
            nodes=SPLIT.nodes,
            predicted_tps=7.25,
            full_tps=3.5,
            prompts=(
                PlanPrompt(tokens=2048, tokens_per_second=64.0, first_token_s=32.0),
                PlanPrompt(tokens=4096, tokens_per_second=50.0, first_token_s=81.92),
            ),
            machines=MACHINES,
            split=SPLIT,
        )
    )
    assert "speed      about 7.2 tokens/s, one request at a time; about 3.5 tokens/s at the end of 4,096 tokens" in text
    assert "prompts    about 64.0 tokens/s: the first token 32.0 s after one of 2,048 tokens" in text
    assert "           about 50.0 tokens/s: the first token 81.9 s after one of 4,096 tokens" in text
    assert "It would be divided so: about 7.2 tokens/s, of which the network takes 4.0 ms a token." in text
    assert "desk  host      10" in text
    assert "at a time" not in text.replace("one request at a time", "")
    assert "12.5 GB/s" in text
    assert "lap: its engine cannot share models" in text
    assert "lap: it does not have this model's file" in text


def test_a_speed_of_a_split_names_the_length_of_its_prompt() -> None:
    split = msgspec.structs.replace(SPLIT, prompt_tps=534.0)
    text = render(PlanAnswer(model="big", runs="here", message="", nodes=SPLIT.nodes, split=split))
    assert "a prompt of 2,048 tokens about 534.0 tokens/s" in text


def test_a_full_context_is_told_only_where_it_is_slower() -> None:
    answer = PlanAnswer(model="m", runs="here", message="", context=4096, predicted_tps=10.0, full_tps=9.5)
    assert "at the end of" not in render(answer)
    assert "at the end of" in render(msgspec.structs.replace(answer, full_tps=5.0))


def test_the_size_of_a_prompts_pieces_is_told_where_it_is_chosen() -> None:
    split = msgspec.structs.replace(SPLIT, micro_batch=128)
    text = render(PlanAnswer(model="big", runs="split", message="", nodes=SPLIT.nodes, split=split))
    assert "Prompts are computed 128 tokens at a time, so that all machines work at once." in text


def test_how_many_engines_share_the_slots_and_what_all_requests_get_is_said() -> None:
    split = msgspec.structs.replace(SPLIT, slots=8, groups=2, groups_why="1.32 times as many", together_tps=30.0)
    text = render(PlanAnswer(model="big", runs="split", message="", nodes=SPLIT.nodes, split=split))
    assert "On the host 2 engines share all 8 slots (1.32 times as many): about 30.0 tokens/s together." in text
    one = render(PlanAnswer(model="big", runs="split", message="", nodes=SPLIT.nodes, split=SPLIT))
    assert "On the host one engine has the one slot." in one


def test_what_does_not_fit_says_what_to_do() -> None:
    answer = PlanAnswer(model="big", runs="no", message="big does not fit: need 55.0 GB.", hint="Join another machine.")
    text = render(msgspec.structs.replace(answer, machines=MACHINES[:1]))
    assert text.startswith("big does not fit: need 55.0 GB.\n  Join another machine.")
    assert "tokens/s" not in text


def test_without_a_node_it_is_for_the_engine_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path / "home"))
    head, size = header(llama_metadata(), llama_tensors())
    model = tmp_path / "m.gguf"
    model.write_bytes(head + bytes(size - len(head)))
    result = CliRunner().invoke(plan, [str(model), "--bin-dir", str(tmp_path)])
    assert isinstance(result.exception, MeshError)
    assert result.exception.code == "bin_dir_empty"


def test_a_model_larger_than_video_memory_is_shown_with_both_sums() -> None:
    gpu = PlanMemory(weights=6 * 10**9, cache=10**9, compute=5 * 10**8, total_bytes=75 * 10**8, have_bytes=8 * 10**9)
    main = PlanMemory(weights=12 * 10**9, compute=10**8, total_bytes=121 * 10**8, have_bytes=50 * 10**9)
    text = "31 of 48 layers on the GPU, experts in memory"
    answer = PlanAnswer(
        model="big",
        runs="here",
        message=f"big fits desk alone, beyond its GPU: {text}: about 14 tokens/s.",
        context=16_384,
        slots=1,
        nodes=(HERE,),
        predicted_tps=14.2,
        cache_type="q8_0",
        offload=PlanOffload(text=text, layers=48, gpu_layers=31, cpu_moe=48, gpu=gpu, memory=main),
        machines=(msgspec.structs.replace(MACHINES[0], fits=True, offload=text),),
    )
    shown = render(answer)
    assert "31 of 48 layers on the GPU, experts in memory: about 14 tokens/s." in shown
    assert f"division   {text}, KV cache q8_0" in shown
    assert "GPU        7.5 GB of 8.0 GB: weights 6.0 GB + KV 1.0 GB + compute 500.0 MB" in shown
    assert "memory     12.1 GB of 50.0 GB: weights 12.0 GB + KV - + compute 100.0 MB" in shown
    assert "in part" in shown
