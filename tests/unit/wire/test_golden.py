"""The recorded bytes that nodes of all versions exchange: a refactoring must not change any of them.

Announcements and gossip have their own records. After an intended change of the format,
`python -m tests.unit.wire.test_golden` writes the record again.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from tests.unit.wire.toy_keys import ToyKey

from mesh_llm.core.listing.content import ListedModel, Listing
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelKind, ModelStatus, Rates, Speed
from mesh_llm.wire import discovery, llama_state
from mesh_llm.wire.codec import Malformed, encode, fingerprint
from mesh_llm.wire.ggml_rpc import packing, protocol, tensors, tunnel
from mesh_llm.wire.mesh import admission, certificates, frames, invites, routes, streams

RECORD = Path(__file__).parents[2] / "data/wire/golden/streams.json"

MESH, FOUNDER, MEMBER, JOINER = (ToyKey(name) for name in ("mesh", "founder", "member", "joiner"))
NONCE = b"12345678"
LATER = 2_000_000
SAME = object()
"""In place of a decoded value: what was encoded."""


class Golden(NamedTuple):
    """One message: how it is written and read (None: never read), and what reading gives if not the value itself."""

    value: Any
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any] | None = None
    decoded: Any = SAME


def _certificate() -> certificates.Certificate:
    founder = certificates.founder_certificate(MESH.public, FOUNDER.public, LATER, MESH.sign)
    member = certificates.issue_certificate(
        founder, MEMBER.public, admission.Scope.SERVE, LATER - 1, b"i" * 16, FOUNDER.sign
    )
    assert isinstance(member, certificates.Certificate)
    joiner = certificates.issue_certificate(
        member,
        JOINER.public,
        admission.Scope.CLIENT,
        LATER,
        b"j" * 16,
        MEMBER.sign,
        inviter=bytes(range(32)),
        rests=[b"r" * 16, b"s" * 32],
    )
    assert isinstance(joiner, certificates.Certificate)
    return joiner


CERTIFICATE = _certificate()


def _invite(issuer: certificates.Certificate | None, key: ToyKey, contact: ToyKey, uses: int) -> invites.Invite:
    addresses = (invites.pack_address("192.168.1.20:4433"), invites.pack_address("[fd00::1]:4433"))
    contacts = (invites.Contact(contact.public, addresses, "https://relay.example.org"), invites.Contact(MESH.public))
    terms = invites.InviteTerms(MESH.public, contacts, NONCE, admission.Scope.CLIENT, LATER - 10, uses)
    invite = invites.issue_invite(terms, issuer, key.sign)
    assert isinstance(invite, invites.Invite)
    return invite


def _member() -> certificates.Certificate:
    return certificates.Certificate(CERTIFICATE.mesh, CERTIFICATE.links[:2])


INVITE = _invite(None, MESH, FOUNDER, 3)
MEMBERS_INVITE = _invite(_member(), MEMBER, MEMBER, 0)
REVOCATION = invites.revoke(
    MESH.public,
    invites.RevocationKind.INVITE,
    MEMBERS_INVITE.id,
    revoker=FOUNDER.public,
    issued=1_000_000,
    sign=FOUNDER.sign,
    chain=_member().links,
    nonce=NONCE,
)
CEILING = invites.revoke(
    MESH.public,
    invites.RevocationKind.CEILING,
    MEMBER.public,
    revoker=FOUNDER.public,
    issued=1_000_000,
    sign=FOUNDER.sign,
    chain=_member().links,
    nonce=invites.ceiling_nonce(admission.Scope.SERVE),
)
REFUSAL = admission.Refusal(admission.Reason.EXPIRED, admission.Subject.INVITE, "on Monday")
SNAPSHOT = RoutingSnapshot(
    version=7,
    node=FOUNDER.node_id,
    default=ModelName("qwen"),
    models={
        ModelName("qwen"): ModelRoute(
            name=ModelName("qwen"),
            status=ModelStatus.WARM,
            targets=(
                Target(
                    node=MEMBER.node_id,
                    local=True,
                    status=ModelStatus.WARM,
                    slots=4,
                    context=8192,
                    load=0.5,
                    tokens_per_second=12.25,
                    term=9,
                ),
            ),
            context=8192,
            size_bytes=10**9,
            reason="",
            aliases=(ModelName("q"),),
            owner="mesh",
            created=1_700_000_000,
            embeddings=False,
            kind=ModelKind.CHAT,
        ),
        ModelName("embed"): ModelRoute(name=ModelName("embed"), status=ModelStatus.LOADING, kind=ModelKind.EMBEDDING),
    },
    alive=frozenset({MEMBER.node_id, JOINER.node_id}),
)
HOSTS = (routes.RouteHost(MEMBER.node_id, ("192.168.1.20:4433",), "https://relay.example.org"),)
LAN = discovery.LanListing(
    mesh=MESH.mesh_id,
    node=FOUNDER.node_id,
    mesh_name="Büro",
    name="rack-1",
    version="0.2.0",
    models=("qwen", "m" * 200, *(f"model-{number}" for number in range(9))),
    more_models=2,
)
LISTING = Listing(
    mesh=MESH.mesh_id,
    name="Open mesh",
    region="eu",
    max_clients=8,
    scope="client",
    version="0.2.0",
    nodes=3,
    clients=2,
    load=0.25,
    memory_bytes=2**36,
    serving=(ListedModel(name="qwen", context=8192),),
    wanted=(ListedModel(name="llama", context=0),),
    on_disk=(ListedModel(name="embed", context=512),),
)
TENSOR = tensors.plain(tensors.F32, (4, 2, 1, 1), 7, 4096, b"blk.0.attn_q.weight")
GRAPH = tensors.Graph(1, 5, (11, 12), (TENSOR._replace(id=11), TENSOR._replace(id=12, op=2, sources=(11,) * 10)))
SPEED = Speed(
    cores=8,
    cached=Rates(f16=10**9, q8=2 * 10**9, q4=3 * 10**9),
    one=Rates(f16=10**8, q8=2 * 10**8, q4=3 * 10**8),
    full=Rates(f16=10**10, q8=2 * 10**10, q4=3 * 10**10),
    step_ns=12345,
    full_step_ns=6789,
)
FACTS = streams.Facts(
    speed=SPEED, round_trips={MEMBER.node_id: 1.5, JOINER.node_id: 0.5}, free_bytes=2**34, takes=False
)


def _frame_of(data: bytes) -> bytes | Malformed | None:
    buffer = frames.FrameBuffer()
    buffer.feed(data)
    payload = buffer.next(frames.MAX_HEADER)
    assert not buffer.rest()
    return payload


def _header(value: frames.StreamHeader) -> bytes:
    return frames.encode_header(frames.StreamType(value.type), value.parameters)


def _read_header(data: bytes) -> frames.StreamHeader | Malformed:
    payload = _frame_of(data)
    assert isinstance(payload, bytes)
    return frames.decode_header(payload)


def _reply(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        head = streams.decode_reply_head(data[: streams.REPLY_HEAD])
        assert isinstance(head, streams.ReplyHead)
        assert head.length == len(data) - streams.REPLY_HEAD
        return decode(data[streams.REPLY_HEAD :])

    return read


def _txt(listing: discovery.LanListing) -> bytes:
    entries = discovery.encode_txt(listing)
    return b"".join(bytes((len(key) + 1 + len(value),)) + key.encode() + b"=" + value for key, value in entries.items())


def _read_txt(data: bytes) -> Any:
    entries: dict[bytes, bytes | None] = {}
    while data:
        key, _, value = data[1 : 1 + data[0]].partition(b"=")
        entries[key], data = value, data[1 + data[0] :]
    return discovery.decode_txt(entries)


def _packed(value: Any) -> Golden:
    def read(data: bytes) -> Any:
        return type(value).unpack(memoryview(data))

    return Golden(value, type(value).pack, read)


def _graph(graph: tensors.Graph, version: protocol.Version) -> Golden:
    return Golden(graph, partial(tensors.pack_graph, version=version), partial(tensors.parse_graph, version=version))


def _hello_request(_: object) -> bytes:
    return protocol.hello_request()


def _undelivered(data: bytes) -> Any:
    value = tunnel.decode_to_host(data)
    assert isinstance(value, tunnel.Undelivered)
    return (value.peer, value.counter, value.tag, bytes(value.data))


_SESSION = b"s" * 16
_REQUEST = admission.AdmitRequest(2, 3, "0.2.0", NONCE, b"certificate", (b"one", b"two"))
_ADMIT_REPLIES = {
    "admitted": admission.Admitted(2, "0.2.0", NONCE, b"certificate", b"granted"),
    "refused": admission.Refused(REFUSAL, "0.2.0"),
    "approved": admission.Approved(b"invite", "0.2.0"),
}
_ADMIT_ASKS = {
    "least": admission.AdmitRequest(2, 2, "", NONCE),
    "invites": _REQUEST,
    "ask": msgspec.structs.replace(_REQUEST, ask=admission.ApprovalRequest("laptop", admission.Scope.SPLIT)),
}
_ROUTES_REPLIES = {
    "table": routes.table_of(SNAPSHOT, NONCE, HOSTS),
    "unchanged": routes.RoutesUnchanged(2.5),
}


def _chain(tokens: range) -> bytes:
    return b"".join(llama_state.chain(tokens, b"k" * 32))


_CACHE_ASKED = streams.CacheParameters(bytes(range(32)), NONCE * 2)
_CACHE_QUESTION = streams.CacheQuestion((b"m" * 16, b"n" * 16), (b"a" * 16, b"b" * 16, b"c" * 16))
_MODEL_REQUESTS = {"offer": streams.WantOffer(), "list": streams.WantDigests(1), "chunk": streams.WantChunk(0, 300)}
_OFFER = streams.Offer(
    (streams.OfferedFile(5, b"s" * 32, b"c" * 32), streams.OfferedFile(9, b"s" * 32, b"c" * 32, "p.gguf"))
)
_TO_WORKER = {
    "open": tunnel.Open("8.0.0", b"k" * 32, b"sketch00", takes_padding=True),
    "peer": tunnel.Peer(3, "192.168.1.20:4433", _SESSION, takes_padding=True),
}
_TO_HOST = {
    "opened": tunnel.Opened("8.0.0", (tunnel.DeviceFacts(32, 2**34, 2**33, 2**34),), b"d" * 32, 2**33, unpacks=True),
    "opened/sets": tunnel.Opened("8.0.0", (tunnel.DeviceFacts(32, 2**34, 2**33, 2**34),), unpacks_sets=True),
    "peer_state": tunnel.PeerState(3, reachable=False, reason="no route"),
    "filled": tunnel.LoadedFromDisk(12),
    "ended": tunnel.Ended("no_memory", "There is not enough memory.", "Free some."),
    "padding": tunnel.Padding(b"\0" * 8),
}

GOLDEN: dict[str, Golden] = {
    "frame": Golden(b"payload", frames.frame, _frame_of),
    **{
        f"header/{kind.name.lower()}": Golden(frames.StreamHeader(kind, b"parameters"), _header, _read_header)
        for kind in frames.StreamType
    },
    "certificate": Golden(CERTIFICATE, encode, certificates.decode_certificate),
    "invite": Golden(INVITE, encode, invites.decode_invite),
    "invite/member": Golden(MEMBERS_INVITE, encode, invites.decode_invite),
    "invite/text": Golden(INVITE, invites.format_invite, invites.parse_invite),
    "invite/id": Golden(NONCE, partial(invites.invite_id, FOUNDER.public)),
    "revocation": Golden(REVOCATION, encode, invites.decode_revocation),
    "revocation/ceiling": Golden(CEILING, encode, invites.decode_revocation),
    **{f"admit/{name}": Golden(one, encode, admission.decode_admit_request) for name, one in _ADMIT_ASKS.items()},
    **{f"admit/{name}": Golden(one, encode, admission.decode_admit_reply) for name, one in _ADMIT_REPLIES.items()},
    "routes/request": Golden(routes.RoutesRequest(NONCE, 7, 2.5), encode, routes.decode_routes_request),
    **{f"routes/{name}": Golden(one, encode, routes.decode_routes_reply) for name, one in _ROUTES_REPLIES.items()},
    "measure": Golden(FACTS, streams.encode_facts, streams.decode_facts),
    "split": Golden(tunnel.SplitStream("big", 7, b"tunnel"), encode, tunnel.decode_split_stream),
    "model/asked": Golden(streams.ModelParameters("a/b: c", "0f"), encode, streams.decode_model_parameters),
    **{f"model/{name}": Golden(one, encode, streams.decode_model_request) for name, one in _MODEL_REQUESTS.items()},
    "model/offered": Golden(_OFFER, streams.encode_model_reply, _reply(streams.decode_offer)),
    "model/preparing": Golden(streams.Preparing(1, 2), streams.encode_model_reply, _reply(streams.decode_preparing)),
    "model/refused": Golden(
        streams.ModelRefused("it is gone"), streams.encode_model_reply, _reply(streams.decode_model_refused)
    ),
    "cache/asked": Golden(_CACHE_ASKED, encode, streams.decode_cache_parameters),
    "cache/question": Golden(_CACHE_QUESTION, encode, streams.decode_cache_question),
    "cache/offer": Golden(streams.CacheOffer(3328, 10_223_616), encode, streams.decode_cache_answer),
    "cache/refused": Golden(streams.CacheRefused("it is busy"), encode, streams.decode_cache_answer),
    "cache/key": Golden(NONCE * 2, partial(streams.cache_key, FOUNDER.node_id, MEMBER.node_id)),
    "cache/mark": Golden(b"m" * 16, partial(streams.mark_proof, key=b"k" * 32)),
    "cache/chain": Golden(range(512), _chain),
    "lan": Golden(
        LAN,
        _txt,
        _read_txt,
        msgspec.structs.replace(LAN, models=("qwen", "m" * 96, *LAN.models[2:8]), more_models=5),
    ),
    "nostr": Golden(
        discovery.Posting(
            listing=LISTING,
            token=invites.format_invite(INVITE),
            proof=discovery.author_proof(MESH.mesh_id, b"a" * 32, FOUNDER.sign),
        ),
        discovery.encode_posting,
        discovery.decode_posting,
    ),
    "fingerprint": Golden(FOUNDER.node_id, fingerprint),
    "tunnel/stream": Golden(tunnel.TunnelStream(_SESSION, control=True), encode, tunnel.decode_tunnel_stream),
    **{f"tunnel/{name}": Golden(one, encode, tunnel.decode_to_worker) for name, one in _TO_WORKER.items()},
    **{f"tunnel/{name}": Golden(one, encode, tunnel.decode_to_host) for name, one in _TO_HOST.items()},
    "tunnel/undelivered": Golden(
        tunnel.Undelivered(3, 9, b"t" * 16, memoryview(b"data")),
        encode,
        _undelivered,
        (3, 9, b"t" * 16, b"data"),
    ),
    "tunnel/reference": _packed(tunnel.Reference(3, 1, 7, 4096, (4, 2, 1, 1))),
    "tunnel/push": _packed(tunnel.Push(memoryview(bytes(312)), 9, b"t" * 16, 3)),
    "tunnel/wait": _packed(tunnel.Wait(memoryview(bytes(296)), 0, 32, 9)),
    "tunnel/packed_set": _packed(packing.PackedSet(7, bytes(range(256)) + bytes(49), 4, b"data", compressed=False)),
    "tunnel/packed_set/known": _packed(packing.PackedSet(255, b"", 2**20, b"zlib", compressed=True)),
    "tunnel/tag": Golden(9, partial(tunnel.push_tag, b"k" * 32, size=32)),
    "rpc/hello": Golden(protocol.V8, protocol.hello_reply, protocol.parse_hello_reply),
    "rpc/hello_request": Golden((), _hello_request),
    "rpc/tensor": Golden(TENSOR, tensors.Tensor.pack, tensors.unpack),
    "rpc/graph/7": _graph(tensors.Graph(1, 0, GRAPH.nodes, GRAPH.tensors), protocol.V7),
    "rpc/graph/8": _graph(GRAPH, protocol.V8),
}


def _recorded(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.hex()


def test_the_record_names_every_message() -> None:
    assert set(json.loads(RECORD.read_text())) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_value_is_written_as_recorded_and_read_back(name: str) -> None:
    golden = GOLDEN[name]
    recorded: str = json.loads(RECORD.read_text())[name]
    encoded = golden.encode(golden.value)
    assert _recorded(encoded) == recorded
    data = recorded if isinstance(encoded, str) else bytes.fromhex(recorded)
    if golden.decode is not None:
        assert golden.decode(data) == (golden.value if golden.decoded is SAME else golden.decoded)


if __name__ == "__main__":
    record = {name: _recorded(golden.encode(golden.value)) for name, golden in GOLDEN.items()}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
