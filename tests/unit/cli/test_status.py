"""The status as text."""

import msgspec
import pytest

from mesh_llm.cli.status import PEER_HEAD, peer_row, render
from mesh_llm.console.status import Status, StatusModel, StatusPeer, StatusSplit, StatusSplitWorker
from mesh_llm.core.types.errors import duration, size

BASE = Status(
    version="1", node_id="a" * 64, mesh_id="b" * 64, mesh_name="lab", name="desk", role="serve", ready=True,
    health="ready", api_port=9337, api_base="http://localhost:9337/v1", token="", uptime_s=3700.0, pid=7, home="h",
    memory_bytes=8_000_000_000, memory_total_bytes=16_000_000_000, devices=("CPU",), engine="embedded 1",
    models=(), peers=(),
)  # fmt: skip


def test_who_computes_nothing_of_a_model_is_named() -> None:
    text = "bob computes nothing of red: one layer needs 790.6 MB there, and it offers 500.0 MB."
    model = StatusModel(name="red", status="warm", left_out=(text,))
    assert f"  {text}\n" in render(msgspec.structs.replace(BASE, models=(model,))) + "\n"


def test_models_and_peers_are_listed() -> None:
    status = msgspec.structs.replace(
        BASE,
        token="mesh1abc",
        token_scope="split",
        scope="split",
        models=(
            StatusModel(
                name="tiny",
                status="warm",
                hosts=("desk",),
                host_ids=("a" * 64,),
                nodes=1,
                context=4096,
                slots=4,
                size_bytes=6_000_000,
                here=True,
            ),
            StatusModel(name="big", status="cold", size_bytes=55_000_000_000, reason="need 55.0 GB, have 8.0 GB"),
        ),
        peers=(
            StatusPeer(
                node_id="c" * 64, name="lap", role="serve", state="alive", serving=("x",), rtt_ms=1.25, scope="serve"
            ),
        ),
    )
    text = render(status)
    assert "desk: serve, ready, up 1h 1m (pid 7)" in text
    assert "tiny   warm   4096     4      6.0 MB   desk (here)" in text
    assert "big: need 55.0 GB, have 8.0 GB" in text
    assert "1.2 ms" in text
    assert "mesh-llm --join mesh1abc" in text
    assert "Its scope is split: it may send requests, answer them, and lend memory." in text
    assert "lap   serve  serve  alive" in text


@pytest.mark.parametrize(
    ("path", "transport", "reason", "shown"),
    [
        ("direct", "tcp", "", "direct, tcp"),
        ("direct", "quic", "", "direct, quic"),
        ("direct", "quic", "TCP gave no answer within 3 s", "direct, quic: TCP gave no answer within 3 s"),
        # The path says why already.
        ("relay", "relay", "the nodes do not reach each other directly", "relay"),
    ],
)
def test_a_peer_that_is_not_reached_over_tcp_has_the_reason(path: str, transport: str, reason: str, shown: str) -> None:
    peer = StatusPeer(
        node_id="c" * 64, name="lap", role="serve", state="alive", path=path, transport=transport,
        transport_reason=reason,
    )  # fmt: skip
    assert peer_row(peer)[-1] == shown


def test_addresses_and_the_need_of_a_key_are_said() -> None:
    status = msgspec.structs.replace(BASE, ollama_base="http://localhost:11434", needs_key=True)
    assert "API      http://localhost:9337/v1   needs an API key\n  Ollama   http://localhost:11434\n" in render(status)
    assert "Ollama" not in render(BASE)
    assert "needs an API key" not in render(BASE)


def test_a_split_model_is_told_with_who_computes_what() -> None:
    worker = StatusSplitWorker(node_id="c" * 64, name="lap", ratio=0.4, layers=5, memory_bytes=3_000_000_000)
    relayed = msgspec.structs.replace(worker, name="shelf", rtt_ms=2.0, direct_push=False, loaded=0.25)
    split = StatusSplit(
        model="big", host="a" * 64, term=3, ratio=0.2, layers=2, workers=(worker, relayed), round_trips_per_token=2.0,
        predicted_tps=9.5, measured_tps=8.25,
    )  # fmt: skip
    text = render(msgspec.structs.replace(BASE, split=split))
    assert "big is split over 3 nodes: 8.2 tokens/s, 9.5 predicted, 2.0 round trips a token" in text
    read = msgspec.structs.replace(split, measured_prompt_tps=120.4, predicted_prompt_tps=150.0)
    both = render(msgspec.structs.replace(BASE, split=read))
    assert "9.5 predicted, prompts of 2,048 tokens 120 tokens/s, 150 predicted, 2.0 round trips a token" in both
    first = msgspec.structs.replace(split, predicted_prompt_tps=150.0)
    assert "9.5 predicted, prompts of 2,048 tokens 150 predicted, 2.0 round" in render(
        msgspec.structs.replace(BASE, split=first)
    )
    assert "Activations" not in text
    several = msgspec.structs.replace(split, groups=2, groups_planned=2, groups_why="1.3 times the tokens of one")
    text = render(msgspec.structs.replace(BASE, split=several))
    assert "2 engines share the slots (1.3 times the tokens of one)." in text
    fewer = msgspec.structs.replace(several, groups=1)
    assert "the tokens of one); 1 now." in render(msgspec.structs.replace(BASE, split=fewer))
    rounded = msgspec.structs.replace(split, wire="f16 for prompts, f32 for tokens")
    text = render(msgspec.structs.replace(BASE, split=rounded))
    assert "\nActivations travel as f16 for prompts, f32 for tokens." in text
    assert "desk   host" in text
    assert "shelf  loading, 25 %  5       3.0 GB  2.0 ms  through the host" in text


def test_a_client_has_no_engine_and_names_no_device() -> None:
    assert "  engine   none\n" in render(msgspec.structs.replace(BASE, role="client", engine="", devices=()))


def test_without_models_it_says_what_to_do() -> None:
    assert "no models; serve one: mesh-llm load MODEL" in render(BASE)


def test_hostile_names_are_harmless() -> None:
    peer = StatusPeer(node_id="c" * 64, name="\x1b[2Jx\nfake line", role="serve", state="alive")
    text = render(msgspec.structs.replace(BASE, peers=(peer,)))
    assert "\x1b" not in text
    assert "\\x1b[2Jx fake line" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "-"), (999, "999 B"), (5_600_000, "5.6 MB"), (24e9, "24.0 GB"), (2.5e12, "2.5 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (192, "3m 12s"), (187_200, "2d 4h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_on_gpu_and_processor_is_told_with_the_cache_type() -> None:
    text = "31 of 48 layers on the GPU, experts in memory"
    big = StatusModel(
        name="big", status="warm", here=True, offload=text, cache_type="q8_0", device_bytes=75 * 10**8,
        host_bytes=12 * 10**9,
    )  # fmt: skip
    shown = render(msgspec.structs.replace(BASE, host_bytes=50 * 10**9, models=(big,)))
    assert f"big: {text} (7.5 GB there, 12.0 GB of main memory), KV cache q8_0" in shown
    assert "8.0 GB offered of 16.0 GB, and 50.0 GB of main memory" in shown
    plain = msgspec.structs.replace(big, offload="", cache_type="f16")
    assert "KV cache" not in render(msgspec.structs.replace(BASE, models=(plain,)))


def test_the_node_says_itself_whether_it_waits_or_loads() -> None:
    for health in ("waiting", "loading"):
        assert f"desk: serve, {health}, up" in render(msgspec.structs.replace(BASE, health=health))


@pytest.mark.parametrize(("owner", "shown"), [("1" * 64, "yours"), ("2" * 64, "2222222222"), ("", "-")])
def test_whose_a_peer_is(owner: str, shown: str) -> None:
    peer = StatusPeer(node_id="c" * 64, name="lap", role="serve", state="alive", owner=owner)
    assert peer_row(peer, "1" * 64)[PEER_HEAD.index("OWNER")] == shown
    # Without an owner here, nobody's node is yours.
    assert peer_row(peer)[PEER_HEAD.index("OWNER")] in {owner[:10], "-"}
