"""What the user sees of admission: invites and requests to join. The management API sends both as they are."""

import msgspec


class InviteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An invite that this node issued. `uses_left` None: unlimited. Times are UNIX seconds.

    `shown`: where others find it: `listing`, which strangers can read, `start` for the one that the node prints; empty:
    only whoever got it by hand has it.
    """

    id: str
    scope: str
    created: float
    expires: float
    uses_left: int | None = None
    revoked: bool = False
    token: str = ""
    shown: str = ""


class WaitingNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node near by that asks to join without an invite. Times are UNIX seconds; texts bounded and printable.

    Attributes:
        id: the fingerprint of its key, which its own screen shows too.
        name: what it calls itself; nothing vouches for it.
        scope: what it asks for, or what it was granted: `client`, `serve` or `split`.
        since: its first request.
        expires: when the request ends without an answer.
        address: where the request came from.
        version: of its program.
        node_id: its key.
        state: pending, approved, denied or expired.
    """

    id: str
    name: str
    scope: str
    since: float
    expires: float = 0.0
    address: str = ""
    version: str = ""
    node_id: str = ""
    state: str = "pending"
