"""Damaged real graphs that the firewall accepts touch only their tensors, as a model of the kernels sees it."""

import random
from functools import cache

import pytest
from tests.support.rpc_attacks import ATTACKS, SIZES, Place
from tests.support.rpc_corpus import ALLOCATED, Recording, each_architecture, new_firewall, recordings, show
from tests.support.rpc_kernel_model import MODELLED, touched

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.firewall.graphs import check_graph
from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, FrameError
from mesh_llm.wire.ggml_rpc.rules import RULES, RULES_BY_NAME
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, IDLE, OPERATORS, Graph, Tensor, operator_name, parse_graph

SEED = 20261128
_ROPES = {OPERATORS["rope"], OPERATORS["rope_back"]}
ROUNDS = 100
"""Damaged graphs of each recorded architecture."""


@cache
def graphs(architecture: str) -> list[tuple[Recording, Graph]]:
    """Some of an architecture's graphs that are accepted unchanged, with the recording around them."""
    found: list[tuple[Recording, Graph]] = []
    for recording in recordings(architecture):
        payloads = [step.payload for step in recording.steps if step.command == Command.GRAPH_COMPUTE]
        for payload in payloads[:: max(1, len(payloads) // 4)]:
            graph = parse_graph(payload, V8)
            if accepts(recording, graph):
                found.append((recording, graph))
    return found


def accepts(recording: Recording, graph: Graph) -> bool:
    """Whether the graph may be computed in the recording's buffers."""
    firewall = new_firewall(recording)
    for step in recording.steps:
        if step.command == ALLOCATED:
            show(firewall, step)
    try:
        check_graph(graph, firewall.buffers)
    except (RefusedError, FrameError):
        return False
    return True


def outside(graph: Graph) -> list[str]:
    """Nodes whose kernels leave a tensor."""
    by_id = {tensor.id: tensor for tensor in graph.tensors}
    wrong: list[str] = []
    for node in (by_id[number] for number in graph.nodes):
        if node.op in IDLE or not node.elements or not node.flags & COMPUTE_FLAG:
            continue
        operands = [by_id[source] if source else None for source in node.sources]
        for tensor, end in touched(node, operands) or ():
            # The factors that rope reads are checked against the buffer.
            inside = tensor.extent if tensor is not operands[2] or node.op not in _ROPES else end
            if end > inside:
                wrong.append(f"{operator_name(node.op)} touches {end} of {inside} bytes of {tensor}")
    return wrong


def damaged(graph: Graph, chance: random.Random) -> Graph:
    """The same graph with one or two tensors changed a little."""
    tensors = list(graph.tensors)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(tensors))
        tensors[at] = _change(tensors[at], chance)
    return Graph(graph.device, graph.uid, graph.nodes, tuple(tensors))


def _change(tensor: Tensor, chance: random.Random) -> Tensor:
    def numbers(values: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(values)
        at = chance.randrange(len(changed))
        changed[at] = max(0, chance.choice((
            changed[at] + 1, changed[at] - 1, changed[at] * 2, changed[at] // 2, 0, 1, chance.choice(values), 4096
        )))  # fmt: skip
        return tuple(changed)

    match chance.randrange(7):
        case 0:
            return tensor._replace(shape=numbers(tensor.shape))  # pyright: ignore[reportArgumentType]
        case 1:
            return tensor._replace(strides=numbers(tensor.strides))  # pyright: ignore[reportArgumentType]
        case 2:
            shape = list(tensor.shape)
            chance.shuffle(shape)
            return tensor._replace(shape=tuple(shape))  # pyright: ignore[reportArgumentType]
        case 3:
            return tensor._replace(params=numbers(tensor.params))
        case 4:
            return tensor._replace(type=chance.choice(list(GGML_TYPES)))
        case 5:
            return tensor._replace(op=chance.choice(list(RULES)))
        case _:
            return tensor._replace(data=max(0, tensor.data + chance.choice((-64, -4, 1, 4, 64, 4096))))


@pytest.mark.parametrize("architecture", each_architecture())
def test_real_graphs_touch_only_their_tensors(architecture: str) -> None:
    assert [wrong for _, graph in graphs(architecture) for wrong in outside(graph)] == []


@pytest.mark.parametrize("architecture", each_architecture())
def test_accepted_graphs_touch_only_their_tensors(architecture: str) -> None:
    chance = random.Random(f"{SEED} {architecture}")
    accepted = 0
    if not graphs(architecture):
        pytest.skip("none of its graphs is accepted: see COMPUTED_ROWS in test_rpc_corpus.py")
    for _ in range(ROUNDS):
        recording, graph = chance.choice(graphs(architecture))
        changed = damaged(graph, chance)
        if not accepts(recording, changed):
            continue
        accepted += 1
        assert outside(changed) == []
    assert accepted > ROUNDS // 20, "too few are accepted for this to mean anything"


def test_every_rule_is_in_the_model() -> None:
    """But for IM2COL, whose loops the rule repeats."""
    assert set(RULES_BY_NAME) - MODELLED == {"im2col"}


@pytest.mark.parametrize(
    "name",
    [
        "a copy with a second operand of wide strides",
        "argsort of rows far apart",
        "glu of rows far apart",
        "scale of one row in many matrices",
        "a copy of blocks into a row",
        "ssm_scan with the stride of a dimension of 1",
        "a part that is set behind the end",
        "a hadamard product with a narrow matrix",
        "rope of an odd width",
        "pool_2d of planes in one place",
    ],
)
def test_the_model_sees_known_attacks(name: str) -> None:
    buffers = [Buffer(number, (number + 1) << 32, size) for number, size in enumerate(SIZES)]
    attack = ATTACKS[name](Place(buffers))
    assert outside(Graph(0, 1, attack.order, tuple(attack.tensors)))
