"""Which targets are tried, in which order, and what is said when none answers."""

import msgspec
import pytest
from tests.support.api_harness import (
    ELSEWHERE,
    HERE,
    THERE,
    local,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, fake_upstream


async def test_the_next_target_answers_when_the_best_does_not():
    async def die(call: Call) -> None:
        call.die()

    async with fake_upstream(die) as dying, fake_upstream() as healthy, running_api() as api:
        targets = (remote(THERE), remote(ELSEWHERE))
        api.routes.current = snapshot(route("tiny", *targets), default="tiny")
        api.mesh.nodes = {THERE: dying.address, ELSEWHERE: healthy.address}
        for _ in range(8):
            answer = await api.post()
            assert answer.status_code == 200
            assert answer.headers["x-mesh-llm-node"] == ELSEWHERE
        assert ("tiny", THERE) in api.traffic.dead
        assert len(api.traffic.begun) == len(api.traffic.ended)


async def test_what_an_engine_says_of_itself_is_asked_of_this_nodes_own():
    async with fake_upstream() as own, fake_upstream() as other, running_api() as api:
        # By its load, the other one would be chosen.
        here = msgspec.structs.replace(local(own.address), load=1.0)
        api.routes.current = snapshot(route("tiny", remote(THERE), here), default="tiny")
        api.mesh.nodes = {THERE: other.address}
        for path in ("/slots", "/props?model=tiny"):
            assert (await api.client.get(path)).headers["x-mesh-llm-node"] == HERE
        assert (await api.post()).headers["x-mesh-llm-node"] == THERE
        assert (len(own.calls), len(other.calls)) == (2, 1)


async def test_an_unreachable_node_is_passed_over():
    async with fake_upstream() as healthy, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        api.mesh.nodes = {ELSEWHERE: healthy.address}
        for _ in range(8):
            assert (await api.post()).headers["x-mesh-llm-node"] == ELSEWHERE
        assert set(api.traffic.dead) == {("tiny", THERE)}


@pytest.mark.parametrize(
    ("status", "headers", "tried_elsewhere"),
    [
        (503, [], True),
        (503, [(b"x-mesh-llm-error", b"model_loading")], True),
        (404, [(b"x-mesh-llm-error", b"model_not_here")], True),
        (429, [(b"x-mesh-llm-error", b"too_many_requests")], True),
        (404, [], False),
        (429, [], False),
        (500, [(b"x-mesh-llm-error", b"internal_error")], False),
        (400, [], False),
    ],
)
async def test_which_refusals_are_tried_elsewhere(
    status: int, headers: list[tuple[bytes, bytes]], tried_elsewhere: bool
):
    async def refuse(call: Call) -> None:
        await call.respond(b"no", status, headers)

    async with fake_upstream(refuse) as refusing, fake_upstream() as healthy, running_api() as api:
        busy_elsewhere = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        api.routes.current = snapshot(route("tiny", remote(THERE), busy_elsewhere), default="tiny")
        api.mesh.nodes = {THERE: refusing.address, ELSEWHERE: healthy.address}
        answer = await api.post()
        assert len(refusing.calls) == 1
        assert len(healthy.calls) == tried_elsewhere
        assert answer.status_code == (200 if tried_elsewhere else status)
        assert api.traffic.dead == []


async def test_when_all_are_busy_the_shortest_wait_is_told():
    async def busy(call: Call) -> None:
        wait = b"7" if call.headers[b"host"] else b"9"
        await call.respond(b"", 429, [(b"x-mesh-llm-error", b"too_many_requests"), (b"retry-after", wait)])

    async with fake_upstream(busy) as one, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: one.address}
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "7"


async def test_no_more_targets_are_tried_than_allowed():
    async def die(call: Call) -> None:
        call.die()

    nodes = [remote(letter * 64) for letter in "defghijk"]  # type: ignore[arg-type]
    async with fake_upstream(die) as dying, running_api() as api:
        api.routes.current = snapshot(route("tiny", *nodes), default="tiny")
        api.mesh.nodes = {target.node: dying.address for target in nodes}
        assert (await api.post()).status_code == 503
        assert len(dying.calls) == 3
