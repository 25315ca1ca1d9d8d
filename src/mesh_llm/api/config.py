"""What the front door is told: where it listens, who may ask, and its bounds."""

import msgspec

MIB = 1024 * 1024


class ApiConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The front door's settings.

    Attributes:
        host: address to bind (`--listen`).
        port: port to bind (`--port`); 0 picks a free one.
        keys: API keys, one of which a request must show; empty only where `host` is loopback.
        max_in_flight: requests being answered at once, from clients and peers together; one more gets 429.
        max_connections: open client connections; one more is turned away.
        body_bytes: largest request body.
        buffered_bytes: all request bodies held at once.
        head_bytes: largest request head, and largest response head of a target.
        head_seconds: time for a client to send a request's head, from its first byte (or from connecting).
        body_seconds: time for a client to send a body, on top of what `body_rate` allows for its size.
        body_rate: slowest body, bytes per second, once `body_seconds` have passed.
        keep_alive_seconds: how long an idle client connection is kept.
        connect_seconds: time to connect to a target.
        first_byte_seconds: time for a target to begin its answer; long, for prompts take long and requests queue.
        prompt_rate: bytes of a request per second more of that time, for a long prompt.
        chunk_seconds: longest silence in the middle of an answer.
        node_seconds: how much longer another node has for both: its own door gives up first, and says of what.
        attempts: targets tried for one request, at most.
        resume_wait: how long a lost answer waits for a node that can go on with it (`--resume-wait`); 0: not at all.
        resume_bytes: longest answer that is kept to be continued.
        resume_room_bytes: all answers that are kept, beyond the first 64 KiB of each.
        whole_bytes: longest answer that is not streamed and is held until it is whole, so that its loss goes unseen.
        idle_connections: idle keep-alive connections per local engine.
        idle_seconds: how long such a connection is kept; llama-server itself closes after 5 s.
    """

    host: str = "127.0.0.1"
    port: int = 9337
    keys: tuple[str, ...] = ()
    max_in_flight: int = 256
    max_connections: int = 2048
    body_bytes: int = 64 * MIB
    buffered_bytes: int = 256 * MIB
    head_bytes: int = 64 * 1024
    head_seconds: float = 15.0
    body_seconds: float = 20.0
    body_rate: float = 64 * 1024.0
    keep_alive_seconds: float = 75.0
    connect_seconds: float = 5.0
    first_byte_seconds: float = 600.0
    prompt_rate: float = 200.0
    chunk_seconds: float = 120.0
    node_seconds: float = 15.0
    attempts: int = 3
    resume_wait: float = 30.0
    resume_bytes: int = 8 * MIB
    resume_room_bytes: int = 64 * MIB
    whole_bytes: int = 256 * 1024
    idle_connections: int = 16
    idle_seconds: float = 3.0
