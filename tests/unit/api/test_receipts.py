"""Receipts through the API: an asking node, hosts, and engines behind them."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from tests.support.answering_engine import AnsweringEngine
from tests.support.api_harness import ELSEWHERE, HERE, THERE, Api, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, Script, fake_upstream
from tests.support.receipts import ASKER, HOST, OTHER, WORKER, first, read, signer, statement, verify

from mesh_llm.api.receipts import COMMENT, PART_PATH, Notary, Part
from mesh_llm.api.recording import FIRST_HEADER
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.receipts import Mark, examine, holds, who_saw
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream, TransportSilentError
from mesh_llm.core.types.receipt import Announced, FirstPart, Outcome, Served, Statement
from mesh_llm.wire.http.http1 import Headers, ResponseParser, hint_bytes
from mesh_llm.wire.mesh.receipts import (
    first_text,
    parse_first_text,
    read_first,
    request_digest,
    sign_first,
    sign_statement,
)

assert (HERE, THERE, ELSEWHERE) == (ASKER, HOST, OTHER)
CHAT = "/v1/chat/completions"
QUESTION = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Tell me"}]}).encode()
STREAMED = json.dumps(
    {
        "model": "tiny",
        "stream": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Tell me"}],
    }
).encode()
WHOLE = b'{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
SERVED = Served(content=b"m" * 32, fingerprint="f" * 32, quantisation="Q8_0", context=2048, cache_type="f16")


def notary(node: NodeId, served: Served = SERVED) -> Notary:
    return Notary(
        node=node,
        sign=signer(node),
        verify=verify,
        prepare=lambda _: None,
        served=lambda _, __: served,
        announced=lambda _, __: Announced(),
        name_of=lambda node: f"node {node[:1]}",
    )


async def whole(call: Call) -> None:
    await call.respond(WHOLE, kind=b"application/json")


def streaming(life: str = "first", dies_after: int | None = None) -> Script:
    engine = AnsweringEngine(life)

    async def script(call: Call) -> None:
        request = json.loads(call.body)
        if call.target == "/tokenize":
            await call.respond(b'{"tokens":[1,2,3]}', kind=b"application/json")
            return
        await call.begin_stream()
        for event in engine.stream(call.target, request)[:dies_after]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        if dies_after is None:
            await call.end_stream()
        else:
            call.die()

    return script


@asynccontextmanager
async def host(node: NodeId, script: Script, asker: NodeId = HERE, **given: Any) -> AsyncGenerator[tuple[str, Api]]:
    """A node with an engine: its address for streams of the asking node."""
    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address, node=node))]) as api:
        api.server.use_notary(notary(node, **given))
        async with peer_streams(api.server, asker) as address:
            yield address, api


@asynccontextmanager
async def asking(*hosts: tuple[NodeId, str], **config: Any) -> AsyncGenerator[Api]:
    """The node that a client asks; the first host is the best one."""
    targets = [msgspec.structs.replace(remote(node), load=0.9 * place) for place, (node, _) in enumerate(hosts)]
    given: dict[str, Any] = {"resume_wait": 0.0, **config}
    settings = ApiConfig(port=0, **given)
    async with running_api([route("tiny", *targets)], config=settings) as api:
        api.server.use_notary(notary(HERE))
        api.mesh.nodes = dict(hosts)
        yield api


async def kept(api: Api, name: str) -> dict[str, Any]:
    answer = await api.get(f"/v1/receipts/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_answer_in_one_piece_carries_its_receipt_in_a_header() -> None:
    async with host(THERE, whole) as (address, _), asking((THERE, address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        text = answer.headers["x-mesh-llm-receipt"]
        checked = read(text)
        given: dict[str, Any] = {
            "request": sha256(QUESTION).digest(),
            "answer": sha256(answer.content).digest(),
            "node": HERE,
        }
        assert holds(examine(checked, **given)), examine(checked, **given)
        (made,) = checked.receipt.steps
        (said,) = checked.statements
        assert isinstance(said, Statement)
        assert made.request == request_digest("POST", CHAT, QUESTION) == said.request
        assert (said.model, said.quantisation, said.context, said.prompt_tokens, said.tokens) == (
            "tiny", "Q8_0", 2048, 5, 2,
        )  # fmt: skip
        shown = await kept(api, answer.headers["x-mesh-llm-receipt-id"])
        assert shown["receipt"] == text
        assert shown["holds"]
        assert [(one["name"], one["part"], one["signed"]) for one in shown["seen"]] == [
            ("node a", "asked", True),
            ("node b", "host", True),
        ]


async def test_a_stream_ends_with_its_receipt_as_a_comment_and_has_its_id_from_the_beginning() -> None:
    async with host(THERE, streaming()) as (address, _), asking((THERE, address)) as api:
        plain = (await api.post(STREAMED, CHAT)).content
        answer = await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        content, _, comment = answer.content.partition(COMMENT)
        assert content == plain
        assert comment.endswith(b"\n\n")
        assert comment.count(b"\n") == 2
        checked = read(comment.decode().strip())
        given: dict[str, Any] = {"request": sha256(STREAMED).digest(), "answer": sha256(content).digest()}
        assert holds(examine(checked, **given)), examine(checked, **given)
        assert checked.receipt.id.hex() == answer.headers["x-mesh-llm-receipt-id"]
        assert isinstance(said := checked.statements[0], Statement)
        assert said.tokens > 0


async def test_a_resumed_answer_names_every_host_in_a_chain() -> None:
    async with (
        fake_upstream(streaming("first", 7)) as mortal,
        host(ELSEWHERE, streaming("second")) as (address, _),
        asking((THERE, mortal.address), (ELSEWHERE, address)) as api,
    ):
        answer = await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        assert b"continued by" in answer.content
        checked = read(answer.content.partition(COMMENT)[2].decode().strip())
        assert holds(examine(checked)), examine(checked)
        assert [(one.node, one.outcome) for one in checked.receipt.steps] == [
            (THERE, Outcome.LOST),
            (ELSEWHERE, Outcome.ANSWERED),
        ]
        assert [(one.node, one.part) for one in who_saw(checked)] == [
            (HERE, "asked"),
            (THERE, "lost"),
            (ELSEWHERE, "host"),
        ]
        assert isinstance(said := checked.statements[1], Statement)
        assert said.previous == checked.chain[0]


async def test_a_host_that_does_not_take_the_request_is_named() -> None:
    async def busy(call: Call) -> None:
        await call.respond(b"{}", 503, kind=b"application/json")

    async with (
        fake_upstream(busy) as refusing,
        host(ELSEWHERE, whole) as (address, _),
        asking((THERE, refusing.address), (ELSEWHERE, address)) as api,
    ):
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        checked = read(answer.headers["x-mesh-llm-receipt"])
        assert holds(examine(checked)), examine(checked)
        assert [one.outcome for one in checked.receipt.steps] == [Outcome.REFUSED, Outcome.ANSWERED]


async def test_a_host_that_never_got_the_request_is_not_named() -> None:
    async with host(ELSEWHERE, whole) as (address, _), asking((THERE, "127.0.0.1:1"), (ELSEWHERE, address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        checked = read(answer.headers["x-mesh-llm-receipt"])
        assert [one.node for one in checked.receipt.steps] == [ELSEWHERE]


async def test_a_request_that_is_begun_again_on_another_transport_is_two_steps_of_one_host() -> None:
    class Silent:
        """A stream that its node never accepts."""

        async def read(self, limit: int) -> bytes:
            raise TransportSilentError("TCP stopped answering")

        async def write(self, data: bytes) -> None: ...

        async def finish(self) -> None: ...

        def abort(self) -> None: ...

    streams: list[ByteStream] = [Silent()]
    async with host(THERE, whole) as (address, _), asking((THERE, address)) as api:

        async def open_stream(target: Target) -> ByteStream:
            return streams.pop() if streams else await api.mesh.open_stream(target)

        api.server.use_mesh(open_stream)
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        assert b"Hi" in answer.content
        checked = read(answer.headers["x-mesh-llm-receipt"])
        assert holds(examine(checked)), examine(checked)
        assert [(one.node, one.outcome) for one in checked.receipt.steps] == [
            (THERE, Outcome.LOST),
            (THERE, Outcome.ANSWERED),
        ]


async def test_an_engine_of_the_asking_node_and_its_workers() -> None:
    served = msgspec.structs.replace(SERVED, workers=(WORKER,), system_prompt=True)
    async with fake_upstream(whole) as engine, running_api([route("tiny", local(engine.address))]) as api:
        api.server.use_notary(notary(HERE, served=served))
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        checked = read(answer.headers["x-mesh-llm-receipt"])
        assert holds(examine(checked)), examine(checked)
        assert [(one.node, one.part) for one in who_saw(checked)] == [(HERE, "host"), (WORKER, "worker")]


async def test_a_host_of_an_earlier_version_signs_nothing_and_the_receipt_says_so() -> None:
    async with fake_upstream(whole) as old, asking((THERE, old.address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        assert answer.json()["choices"][0]["message"]["content"] == "Hi"
        shown = await kept(api, answer.headers["x-mesh-llm-receipt-id"])
        assert not shown["holds"]
        assert any("signed nothing" in one["text"] for one in shown["findings"])


@pytest.mark.parametrize("lie", ["replayed", "swapped", "forged", "long", "noise"])
async def test_a_host_that_lies_in_its_part_is_found_out(lie: str) -> None:
    """It gives what it signed about another request, or another answer, or under another key."""
    asked: list[bytes] = []

    async def lying(call: Call) -> None:
        if not call.target.startswith(PART_PATH):
            asked.append(call.headers[b"x-mesh-llm-receipt-part"].partition(b".")[0])
            await call.respond(WHOLE, kind=b"application/json")
            return
        said = Statement(
            host=THERE,
            asker=HERE,
            challenge=b"r" * 16 if lie == "replayed" else bytes.fromhex(asked[-1].decode()),
            previous=b"",
            request=request_digest("POST", CHAT, QUESTION),
            answer=sha256(b"another" if lie == "swapped" else WHOLE).digest(),
            answer_bytes=len(WHOLE),
            status=200,
            whole=True,
            model="tiny",
            content=b"",
            fingerprint="",
            quantisation="",
            context=1,
            engine="",
            cache_type="",
            wire_type="",
            system_prompt=False,
            workers=(),
            prompt_tokens=1,
            cached_tokens=0,
            tokens=1,
            began=1,
            ended=2,
        )
        statement, signature = sign_statement(said, signer(ELSEWHERE if lie == "forged" else THERE))
        part = Part(statement + b"x" * (1 << 15) if lie == "long" else statement, signature)
        await call.respond(b"noise" if lie == "noise" else msgspec.json.encode(part), kind=b"application/json")

    # A fake answers no question between nodes by itself: this one does.
    async with fake_upstream(lying, answers_nodes=True) as liar, asking((THERE, liar.address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        assert answer.json()["choices"][0]["message"]["content"] == "Hi"
        shown = await kept(api, answer.headers["x-mesh-llm-receipt-id"])
        assert not shown["holds"]
        assert not any(one["signed"] for one in shown["seen"] if one["part"] == "host")
        assert shown["model"] == ""


async def test_only_who_asked_gets_the_part_and_only_who_asked_the_receipt() -> None:
    config = ApiConfig(port=0, resume_wait=0.0, keys=("one:secret-one", "two:secret-two"))
    async with (
        fake_upstream(whole) as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
    ):
        api.server.use_notary(notary(HERE))
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on", x_api_key="secret-one")
        path = f"/v1/receipts/{answer.headers['x-mesh-llm-receipt-id']}"
        assert (await api.get(path, x_api_key="secret-one")).status_code == 200
        assert (await api.get(path, x_api_key="secret-two")).status_code == 404
        assert (await api.get(path)).status_code == 401
        assert (await api.get("/v1/receipts/nothing", x_api_key="secret-one")).status_code == 404
        assert (await api.client.delete(path, headers={"x-api-key": "secret-one"})).status_code == 405

    async with host(THERE, whole) as (address, hosting), peer_streams(hosting.server, ELSEWHERE) as stranger:
        challenge = "ab" * 16
        head = f"POST {CHAT} HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-receipt-part: {challenge}.\r\n"
        head += f"x-mesh-llm-model: tiny\r\ncontent-length: {len(QUESTION)}\r\n\r\n"
        assert b"200 OK" in await exchange(address, head.encode() + QUESTION)
        question = f"GET {PART_PATH}?challenge={challenge} HTTP/1.1\r\nhost: mesh\r\n\r\n".encode()
        assert b"404" in (await exchange(stranger, question))[:20]
        assert b"200" in (await exchange(address, question))[:20]


async def test_a_host_signs_what_it_took_before_its_engine_gets_the_prompt() -> None:
    """Bytes on the way: an interim response, and nothing of it where no receipt is asked for."""
    challenge, reached = "ab" * 16, asyncio.Event()

    async def never(call: Call) -> None:
        reached.set()
        await call.gone()

    def question(part: str) -> bytes:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: mesh\r\n{part}x-mesh-llm-model: tiny\r\n"
        return f"{head}content-length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION

    async with host(THERE, never) as (address, _):
        name, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(name, int(port))
        writer.write(question(f"x-mesh-llm-receipt-part: {challenge}.\r\n"))
        hints: list[Headers] = []
        parser = ResponseParser(hinted=hints.append)
        assert parser.feed(await reader.readuntil(b"\r\n\r\n")) == []
        ((field, value),) = hints[0]
        assert field == FIRST_HEADER
        said = read_first(THERE, parse_first_text(value), verify)
        assert isinstance(said, FirstPart)
        assert (said.asker, said.challenge, said.request) == (
            HERE,
            bytes.fromhex(challenge),
            request_digest("POST", CHAT, QUESTION),
        )
        assert (said.model, said.quantisation, said.content) == ("tiny", "Q8_0", b"m" * 32)
        await reached.wait()
        writer.close()
    async with host(THERE, whole) as (address, _):
        assert (await exchange(address, question(""))).startswith(b"HTTP/1.1 200")


async def test_a_receipt_needs_no_first_part_where_its_host_signed_the_end() -> None:
    async with host(THERE, whole) as (address, _), asking((THERE, address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        checked = read(answer.headers["x-mesh-llm-receipt"])
        assert holds(examine(checked)), examine(checked)
        assert checked.firsts == (None,)
        assert FIRST_HEADER.decode() not in answer.headers


def takes(lie: str = "") -> Script:
    """A host that signs its first part, begins to answer, and is killed."""
    before: list[bytes] = []
    begins = streaming(dies_after=7)

    async def script(call: Call) -> None:
        challenge, _, previous = call.headers[b"x-mesh-llm-receipt-part"].partition(b".")
        honest = first(
            THERE,
            challenge=bytes.fromhex(challenge.decode()),
            previous=bytes.fromhex(previous.decode()),
            request=request_digest(call.method, call.target, call.body),
        )
        before.append(sign_first(honest, signer(THERE)))
        said = {
            "forged": sign_first(honest, signer(ELSEWHERE)),
            "replayed": before[0],
            "other host": sign_first(msgspec.structs.replace(honest, host=ELSEWHERE), signer(ELSEWHERE)),
            "other request": sign_first(msgspec.structs.replace(honest, request=b"r" * 32), signer(THERE)),
        }.get(lie, before[-1])
        text = {"noise": b"noise", "cut": first_text(said[:-9]), "long": b"A" * 20_000}.get(lie, first_text(said))
        await call.send(hint_bytes([(FIRST_HEADER, text)]))
        await begins(call)

    return script


async def test_a_killed_host_has_signed_that_it_took_the_prompt() -> None:
    async with (
        fake_upstream(takes()) as mortal,
        host(ELSEWHERE, streaming("second")) as (address, _),
        asking((THERE, mortal.address), (ELSEWHERE, address)) as api,
    ):
        answer = await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        assert b"continued by" in answer.content
        checked = read(answer.content.partition(COMMENT)[2].decode().strip())
        assert holds(examine(checked)), examine(checked)
        assert [(one.node, one.part, one.signed, one.first_only) for one in who_saw(checked)] == [
            (HERE, "asked", True, False),
            (THERE, "lost", True, True),
            (ELSEWHERE, "host", True, False),
        ]
        # The second host has signed what the first one had: it cannot be taken out.
        assert isinstance(said := checked.statements[1], Statement)
        assert said.previous == checked.chain[0]
        shown = await kept(api, checked.receipt.id.hex())
        assert any("did not sign how its answer ended" in one["text"] for one in shown["findings"])
        assert [one["first_only"] for one in shown["seen"]] == [False, True, False]


async def test_of_an_answer_that_nobody_ended_the_first_part_is_shown() -> None:
    async with fake_upstream(takes()) as mortal, asking((THERE, mortal.address)) as api:
        answer = await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        shown = await kept(api, answer.headers["x-mesh-llm-receipt-id"])
        assert shown["holds"], shown["findings"]
        assert (shown["model"], shown["quantisation"], shown["tokens"]) == ("tiny", "Q8_0", 0)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("forged", "the signature is not its host's"),
        ("replayed", "the challenge differs"),
        ("other host", "the signature is not its host's"),
        ("other request", "the host got another request"),
        ("cut", "the signature is not its host's"),
        ("noise", ""),
        ("long", ""),
    ],
)
async def test_a_host_that_lies_in_its_first_part_is_found_out(lie: str, said: str) -> None:
    async with (
        fake_upstream(takes(lie)) as mortal,
        host(ELSEWHERE, streaming("second")) as (address, _),
        asking((THERE, mortal.address), (ELSEWHERE, address)) as api,
    ):
        # A replayed one is of the answer before.
        await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        answer = await api.post(STREAMED, CHAT, x_mesh_llm_receipt="on")
        assert b"continued by" in answer.content
        checked = read(answer.content.partition(COMMENT)[2].decode().strip())
        assert not any(one.signed for one in who_saw(checked) if one.node == THERE)
        wrong = [one.text for one in examine(checked) if one.mark is Mark.FAILS]
        assert [said in one for one in wrong] == ([True] if said else []), wrong


@pytest.mark.parametrize("lie", [{}, {"context": 1}, {"content": b"n" * 32}])
async def test_a_host_whose_end_contradicts_its_first_part_is_found_out(lie: dict[str, Any]) -> None:
    parts: list[Part] = []

    async def host_of_both(call: Call) -> None:
        if call.target.startswith(PART_PATH):
            await call.respond(msgspec.json.encode(parts[-1]), kind=b"application/json")
            return
        facts: dict[str, Any] = {
            "challenge": bytes.fromhex(call.headers[b"x-mesh-llm-receipt-part"].partition(b".")[0].decode()),
            "request": request_digest("POST", CHAT, QUESTION),
        }
        said = statement(THERE, answer=sha256(WHOLE).digest(), answer_bytes=len(WHOLE), **facts)
        parts.append(Part(*sign_statement(said, signer(THERE))))
        begins = sign_first(first(THERE, **facts, **lie), signer(THERE))
        await call.send(hint_bytes([(FIRST_HEADER, first_text(begins))]))
        await call.respond(WHOLE, kind=b"application/json")

    async with fake_upstream(host_of_both, answers_nodes=True) as both, asking((THERE, both.address)) as api:
        answer = await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")
        shown = await kept(api, answer.headers["x-mesh-llm-receipt-id"])
        assert shown["holds"] is not bool(lie)
        wrong = [one["text"] for one in shown["findings"] if one["mark"] == "fails"]
        assert ["contradicts itself" in one for one in wrong] == ([True] if lie else [])


async def exchange(address: str, data: bytes) -> bytes:
    name, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


async def test_without_the_header_nothing_is_signed_and_a_setting_signs_always() -> None:
    async with host(THERE, whole) as (address, _), asking((THERE, address)) as api:
        answer = await api.post(QUESTION, CHAT)
        assert not [name for name in answer.headers if "receipt" in name]
        assert (await api.post(QUESTION, CHAT, x_mesh_llm_receipt="maybe")).status_code == 400
    async with host(THERE, whole) as (address, _), asking((THERE, address), receipts=True) as api:
        assert "x-mesh-llm-receipt" in (await api.post(QUESTION, CHAT)).headers
        assert "x-mesh-llm-receipt" not in (await api.post(QUESTION, CHAT, x_mesh_llm_receipt="off")).headers


async def test_a_client_that_leaves_has_a_receipt_of_who_saw_its_prompt() -> None:
    gone = asyncio.Event()

    async def endless(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"choices":[{"delta":{"content":"a"}}]}')
        await call.gone()
        gone.set()

    async with host(THERE, endless) as (address, _), asking((THERE, address)) as api:
        headers = {"x-mesh-llm-receipt": "on"}
        async with api.client.stream("POST", CHAT, content=STREAMED, headers=headers) as answer:
            name = answer.headers["x-mesh-llm-receipt-id"]
            await anext(answer.aiter_bytes())
        await gone.wait()
        await api.traffic.all_ended(1)
        checked = read((await kept(api, name))["receipt"])
        assert [(one.node, one.outcome) for one in checked.receipt.steps] == [(THERE, Outcome.LEFT)]
        assert isinstance(said := checked.statements[0], Statement)
        assert not said.whole
        assert holds(examine(checked)), examine(checked)


async def test_old_receipts_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_llm.api.receipts._MOST", 2)
    async with fake_upstream(whole) as engine, running_api([route("tiny", local(engine.address))]) as api:
        api.server.use_notary(notary(HERE))
        names = [
            (await api.post(QUESTION, CHAT, x_mesh_llm_receipt="on")).headers["x-mesh-llm-receipt-id"] for _ in range(3)
        ]
        found = [(await api.get(f"/v1/receipts/{name}")).status_code for name in names]
        assert found == [404, 200, 200]


async def test_what_a_node_signed_is_bounded_for_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_llm.api.receipts._PARTS_OF_PEER", 2)
    async with host(THERE, whole) as (address, hosting), peer_streams(hosting.server, ELSEWHERE) as other:

        async def ask(where: str, challenge: str) -> None:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-receipt-part: {challenge}.\r\n"
            head += f"x-mesh-llm-model: tiny\r\ncontent-length: {len(QUESTION)}\r\n\r\n"
            assert b"200 OK" in await exchange(where, head.encode() + QUESTION)

        async def has(where: str, challenge: str) -> bool:
            question = f"GET {PART_PATH}?challenge={challenge} HTTP/1.1\r\nhost: mesh\r\n\r\n".encode()
            return b"200" in (await exchange(where, question))[:20]

        await ask(address, "aa" * 16)
        for number in range(3):
            await ask(other, f"{number:032x}")
        assert await has(address, "aa" * 16)
        assert [await has(other, f"{number:032x}") for number in range(3)] == [False, True, True]
