import pytest

from mesh_llm.core.config import Pace
from mesh_llm.core.membership.state import Suspicion, allowance, shortest
from mesh_llm.core.types.ids import NodeId

PACE = Pace()
A, B, C, ME = NodeId("a"), NodeId("b"), NodeId("c"), NodeId("me")


def test_the_time_to_refute_grows_with_the_logarithm_of_the_mesh() -> None:
    assert shortest(PACE, 0) == shortest(PACE, 2) == shortest(PACE, 10) == PACE.suspicion
    assert shortest(PACE, 100) == pytest.approx(2 * PACE.suspicion)
    assert shortest(PACE, 1000) == pytest.approx(3 * PACE.suspicion)


def test_confirmations_shorten_it() -> None:
    times = [allowance(PACE, 10, confirmations) for confirmations in range(6)]
    assert times[0] == PACE.suspicion * PACE.stretch
    assert times == sorted(times, reverse=True)
    assert times[3] == times[5] == pytest.approx(PACE.suspicion)


def test_where_nobody_could_confirm_the_shortest_holds() -> None:
    assert allowance(PACE, 2, 0) == PACE.suspicion
    assert allowance(PACE, 1, 0) == PACE.suspicion
    assert allowance(PACE, 3, 0) == PACE.suspicion * PACE.stretch
    assert allowance(PACE, 3, 1) == PACE.suspicion


def test_one_liar_proves_nothing_whoever_passes_its_word_on() -> None:
    suspicion = Suspicion(0.0)
    assert suspicion.heard(A, teller=A)
    assert suspicion.heard(B, teller=A)
    assert not suspicion.heard(B, teller=A)
    assert not suspicion.heard(A, teller=C)
    assert not suspicion.proven
    suspicion.heard(B, teller=B)
    assert suspicion.proven


def test_the_own_probe_is_proof() -> None:
    suspicion = Suspicion(5.0)
    assert suspicion.probed(ME)
    assert not suspicion.probed(ME)
    assert suspicion.proven
    assert suspicion.due(PACE, 2) == 5.0 + PACE.suspicion


def test_names_are_bounded() -> None:
    suspicion = Suspicion(0.0)
    for number in range(1000):
        suspicion.heard(NodeId(str(number)), teller=NodeId(str(number)))
    assert len(suspicion.accusers) <= 8
    assert len(suspicion.witnesses) <= 8
