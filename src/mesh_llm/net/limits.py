"""The bounds of this room in one place. Times are seconds."""

import msgspec


class NetLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a node takes from others, and how long it waits for them.

    Attributes:
        dial_timeout: for a connection where direct addresses are known.
        relay_dial_timeout: where only a relay or the lookup service can tell the way.
        admission_timeout: from the handshake until the dialer must be admitted.
        header_timeout: from a stream's opening until its header must be there.
        open_timeout: for opening a stream, which waits while the peer allows no more.
        accept_timeout: until an acknowledged stream must be taken; round trips come on top.
        streams_per_connection: bidirectional streams that a peer may have open at once.
        streams_before_admission: the same, before it is admitted.
        admission_tries: streams that an unadmitted peer may open in all.
        pending_admissions: connections not admitted yet, in all.
        pending_per_address: the same, per source address.
        admissions_per_second: per source address, in the long run.
        admission_burst: per source address, at once.
        connections: admitted connections in all, three quarters of them of clients; further ones are refused.
        keep_open: above so many, idle connections are closed, least recently used first.
        idle_after: unused for so long is idle.
        idle_client_after: the same for connections of passive nodes, which are closed however few there are.
        retry_base: pause after a failed dial; doubles up to `retry_most`.
        retry_most: longest pause.
        settle_timeout: at start, until this node knows its own addresses.
        approval_wait: how long a request to join without an invite waits for the user.
        approval_gone: an asker that does not come again for so long has gone.
        sample_period: between looks at every connection's path.
    """

    dial_timeout: float = 4.0
    relay_dial_timeout: float = 10.0
    admission_timeout: float = 10.0
    header_timeout: float = 5.0
    open_timeout: float = 5.0
    accept_timeout: float = 2.5
    streams_per_connection: int = 512
    streams_before_admission: int = 2
    admission_tries: int = 6
    pending_admissions: int = 256
    pending_per_address: int = 64
    admissions_per_second: float = 20.0
    admission_burst: int = 100
    connections: int = 4096
    keep_open: int = 96
    idle_after: float = 30.0
    idle_client_after: float = 60.0
    retry_base: float = 0.5
    retry_most: float = 8.0
    settle_timeout: float = 3.0
    approval_wait: float = 600.0
    approval_gone: float = 20.0
    sample_period: float = 2.0
