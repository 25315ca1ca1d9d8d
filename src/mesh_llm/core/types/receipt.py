"""A receipt: which nodes got a prompt, which model answered, and who signed that.

A client asks one node, and that node asks hosts: one after another where the first ones refuse or are lost. Each host
signs a `FirstPart` before its engine gets the prompt, and a `Statement` when its answer has ended. The asking node has
a `Step` for each host, and signs the `Receipt` over all. The structs here are the one place where fields and limits are
declared; `wire/mesh/receipts.py` encodes them.
"""

from enum import IntEnum
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.types.announcement import Count, Text
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import LATER, MAX_SPLIT_NODES

DIGEST_BYTES = 32
CHALLENGE_BYTES = 16
RECEIPT_ID_BYTES = 16
MAX_STATEMENT = 5 * 1024
"""Bytes of one encoded statement, or of a first part."""
MAX_FIRST = 64 + MAX_STATEMENT
"""Bytes of a first part with the signature before it."""
MAX_STEPS = 32
"""Most hosts that one answer may have had. An answer that had more gets no receipt."""
MAX_RECEIPT = 400 * 1024
"""Bytes of one encoded receipt; MAX_STEPS steps with the longest statements and texts fit."""

Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
"""A SHA-256."""
MaybeDigest: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]
"""A SHA-256, or nothing."""
Challenge: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=CHALLENGE_BYTES, max_length=CHALLENGE_BYTES)]
Nodes: TypeAlias = Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=MAX_SPLIT_NODES)]
Status: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=999)]


class FirstPart(msgspec.Struct, frozen=True, kw_only=True):
    """What a host signs before its engine gets the prompt: that it took it, and what it serves. All of it is its word.

    It stands where the host ends without a `Statement`, as when it is killed. Fields as of `Statement`.
    """

    host: NodeId
    asker: NodeId
    challenge: Challenge
    previous: MaybeDigest
    request: Digest
    model: Text
    content: MaybeDigest
    fingerprint: Text
    quantisation: Text
    context: Count
    engine: Text
    cache_type: Text
    wire_type: Text
    system_prompt: bool
    workers: Nodes
    began: Count


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What a host signs about one request when its answer has ended. All of it is the host's word.

    Attributes:
        host: the node that signs.
        asker: the node that sent it the request.
        challenge: random bytes that the asker sent along, new for each request: an old statement does not answer them.
        previous: digest of the asker's step before this one; empty for the first host.
        request: digest of the request as the host got it (`request_digest`).
        answer: SHA-256 of the answer's content as the host sent it.
        answer_bytes: length of that content.
        status: HTTP status of the answer.
        whole: the host sent the answer to its end.
        model: served name.
        content: SHA-256 of the model's file; of several files, the SHA-256 over their digests in order. Empty: the host
            has not read the whole file yet.
        fingerprint: of the file's header and size, as announced.
        quantisation: as in `Q4_K_M`; empty: unknown.
        context: tokens that a request can use.
        engine: engine and build.
        cache_type: element type of the KV cache.
        wire_type: how activations travel between the nodes of a split, as in `f16`; empty: not split, or unknown.
        system_prompt: the host put a system prompt of its own settings before the request, where it had none.
        workers: nodes that computed layers. Each sees activations.
        prompt_tokens: of the prompt, cached ones included.
        cached_tokens: those that the engine had in its cache.
        tokens: of the answer.
        began, ended: UNIX milliseconds on the host's clock.
    """

    host: NodeId
    asker: NodeId
    challenge: Challenge
    previous: MaybeDigest
    request: Digest
    answer: Digest
    answer_bytes: Count
    status: Status
    whole: bool
    model: Text
    content: MaybeDigest
    fingerprint: Text
    quantisation: Text
    context: Count
    engine: Text
    cache_type: Text
    wire_type: Text
    system_prompt: bool
    workers: Nodes
    prompt_tokens: Count
    cached_tokens: Count
    tokens: Count
    began: Count
    ended: Count


class Outcome(IntEnum):
    """What became of a request at one host, as the asking node saw it."""

    ANSWERED = 1
    """It gave the answer's end. An error in place of an answer counts too: `status` says so."""
    REFUSED = 2
    """It got the request, and did not take it."""
    LOST = 3
    """It was lost before the answer's end; another host may have gone on."""
    LEFT = 4
    """The client left before the answer's end."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One host that got the request, as the asking node saw it, in the order of asking.

    Attributes:
        node: the host.
        outcome: what became of it.
        challenge: what the host was sent.
        previous: digest of the step before (`step_digest`); empty for the first.
        request: digest of the request as it was sent to this host.
        answer: SHA-256 of the answer's content as it came from this host.
        answer_bytes: length of that content.
        status: HTTP status of the answer; 0: none came.
        fingerprint: of the model's file, as this host had announced it; empty: not known.
        workers: nodes of its split group, as it had announced them.
        statement: what the host signed, encoded; empty: it signed nothing.
        signature: the host's, over `statement`.
        first: the signature of the host's first part, and the first part, encoded; empty: none came, or the statement
            says the same and the step needs no more.
    """

    node: NodeId
    outcome: Outcome
    challenge: Challenge
    previous: MaybeDigest
    request: Digest
    answer: Digest
    answer_bytes: Count
    status: Status
    fingerprint: Text
    workers: Nodes
    statement: Annotated[bytes, msgspec.Meta(max_length=MAX_STATEMENT)] = b""
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    first: Annotated[bytes, msgspec.Meta(max_length=MAX_FIRST), LATER] = b""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the asking node signs about one answer.

    Attributes:
        node: the node that the client asked; it signs, and it saw the prompt too.
        id: random; names the receipt.
        path: of the client's request.
        request: SHA-256 of the content of the client's request, without a byte order mark.
        answer: SHA-256 of the content of the answer to the client, without the receipt itself.
        answer_bytes: length of that content.
        status: HTTP status that the client got.
        began, ended: UNIX milliseconds on this node's clock.
        steps: the hosts that got the request, in order.
    """

    node: NodeId
    id: Annotated[bytes, msgspec.Meta(min_length=RECEIPT_ID_BYTES, max_length=RECEIPT_ID_BYTES)]
    path: Text
    request: Digest
    answer: Digest
    answer_bytes: Count
    status: Status
    began: Count
    ended: Count
    steps: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a host knows of the launch that answered; fields as of `Statement`."""

    content: bytes = b""
    fingerprint: str = ""
    quantisation: str = ""
    context: int = 0
    engine: str = ""
    cache_type: str = ""
    wire_type: str = ""
    system_prompt: bool = False
    workers: tuple[NodeId, ...] = ()


class Announced(msgspec.Struct, frozen=True, kw_only=True):
    """What a host had announced about a model; fields as of `Step`."""

    fingerprint: str = ""
    workers: tuple[NodeId, ...] = ()
