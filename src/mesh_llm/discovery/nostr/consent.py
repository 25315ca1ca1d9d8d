"""What becomes public by a listing, and to what of it the user of this home has agreed."""

import msgspec

from mesh_llm.core.types.announcement import SCOPES, ListingPolicy, ListingScope
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.runtime.home import Home, write_atomic

_MAY = {
    "client": "may ask your models for answers, within quotas (--stranger-limit), so it uses your machines' time",
    "serve": (
        "may ask your models, and may answer requests of this mesh itself: a stranger's machine can then be given, and"
        " read, the prompts that are asked here"
    ),
    "split": (
        "may ask, answer, and compute parts of models with you: a stranger's machine can read prompts, and attack the"
        " memory of machines that lend theirs"
    ),
}


def consent_text(publicity: ListingPolicy, relays: tuple[str, ...]) -> str:
    """What strangers can read once the mesh is listed, and what they may do. Shown before the user is asked."""
    named = f" its name ({publicity.name})," if publicity.name else ""
    placed = f" its region ({publicity.region})," if publicity.region else ""
    return (
        f"This mesh becomes public. Anybody can read on {', '.join(relays)}:{named}{placed} its id; how many nodes and"
        " clients it has, their memory in all, and how busy they are; the names and contexts of the models that they"
        " serve, want, and have on disk; the version; and an invite, which holds this node's id and its network"
        f" addresses. Whoever reads the invite {_MAY[publicity.scope]}"
        f" (--publish-scope {publicity.scope}). Never public: prompts, answers, other nodes' addresses, file paths."
        " The listing is signed by a key made for this (nostr.nsec), renewed every minute, deleted when the node stops,"
        " and expires within two minutes; copies that others keep cannot be taken back. To end it: mesh-llm stop, or"
        " switch it off in the console. To cut off whoever came: mesh-llm invite list, mesh-llm invite revoke ID."
    )


_ALLOWED = {
    "client": (
        "Nodes that find the listing may only send requests (--publish-scope client). With --publish-scope serve their"
        " machines could also be given, and read, prompts that are asked in this mesh, and answer anything."
    ),
    "serve": (
        "--publish-scope serve: machines of anybody who finds the listing can be given, and read, prompts that are"
        " asked in this mesh, and can answer anything. With --publish-scope client they may only send requests."
    ),
    "split": (
        "--publish-scope split: machines of anybody who finds the listing can be given, and read, prompts that are"
        " asked in this mesh, answer anything, and attack machines that lend memory. With --publish-scope client they"
        " may only send requests."
    ),
}


def scope_sentence(policy: ListingPolicy, before: ListingScope | None) -> str:
    """What the scope of a listing allows. `before`: the widest scope to which the user of this home agreed earlier."""
    text = _ALLOWED[policy.scope]
    if policy.scope == "client" and before is not None and before != "client":
        return f"{text} Earlier versions gave serve by default: to keep that, add --publish-scope serve."
    return text


class _Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """The widest scope, and the relays, that the user agreed to. `scope` None: nothing yet."""

    scope: ListingScope | None = None
    relays: tuple[str, ...] = ()


class PublicationConsent:
    """Whether the user agreed to a public listing: once for a home, and again for a wider scope or other relays."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def widest(self, relays: tuple[str, ...]) -> ListingScope | None:
        """The widest scope to which the user agreed on any relay; None: to nothing yet."""
        return self._agreed(relays).scope

    def covers(self, policy: ListingPolicy, relays: tuple[str, ...]) -> bool:
        """Whether the user has agreed to this listing on these relays."""
        agreed = self._agreed(relays)
        if agreed.scope is None:
            return False
        return SCOPES.index(policy.scope) <= SCOPES.index(agreed.scope) and {*relays} <= {*agreed.relays}

    def give(self, policy: ListingPolicy, relays: tuple[str, ...]) -> None:
        """Remember that the user agreed to this. Raises MeshError where the home cannot be written."""
        before = self._read() or _Agreed()
        scopes = (policy.scope, before.scope or policy.scope)
        widest = max(SCOPES.index(scope) for scope in scopes)
        self._write(_Agreed(scope=SCOPES[widest], relays=tuple(dict.fromkeys((*before.relays, *relays)))))

    def withhold(self) -> None:
        """Note that nothing was agreed to yet, if nothing is noted: a Nostr key that is made now is no consent."""
        if self._read() is None and not self._home.nostr_key.exists():
            self._write(_Agreed())

    def _agreed(self, relays: tuple[str, ...]) -> _Agreed:
        agreed = self._read()
        if agreed is not None:
            return agreed
        # Before there was this file, a node told what becomes public when it made its Nostr key.
        return _Agreed(scope="serve", relays=relays) if self._home.nostr_key.exists() else _Agreed()

    def _read(self) -> _Agreed | None:
        try:
            with self._home.explained():
                return msgspec.json.decode(self._home.publication.read_bytes(), type=_Agreed)
        except FileNotFoundError:
            return None
        except UNREADABLE:
            # Damaged: ask again.
            return _Agreed()

    def _write(self, agreed: _Agreed) -> None:
        with self._home.explained():
            write_atomic(self._home.publication, msgspec.json.encode(agreed), 0o600)
