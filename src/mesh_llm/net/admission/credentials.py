"""What is kept of one mesh: a directory below `Home.mesh`, or memory for a node that is to leave nothing behind.

A node's place in its mesh: which mesh, by which certificate, and whether it holds the mesh's own secret.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId
from mesh_llm.net.identity import SigningKey, parse, render
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Refusal, Scope, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, decode_certificate, founder_certificate
from mesh_llm.wire.mesh.invites import Invite, parse_invite

PEERS_FILE = "peers.json"
"""Last-known peers."""
INVITES_FILE = "invites.json"
"""Invites that were made here."""
_CURRENT = "current"

_log = structlog.get_logger(__name__)


class MeshStore:
    """Named byte strings of one mesh; writing is atomic, 0600."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: dict[str, bytes] = {}
        self._unwritten: dict[str, bytes] = {}
        self._put_off: dict[str, Callable[[], bytes]] = {}
        self._health = WriteHealth("what is known of the mesh", "It is written as soon as that works.")

    def read(self, name: str) -> bytes | None:
        """What was written under this name, if anything was."""
        if self._directory is None:
            return self._memory.get(name)
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Keep it. Raises OSError."""
        if self._directory is None:
            self._memory[name] = data
        else:
            write_atomic(self._directory / name, data, 0o600)
        # An older text of the same file must not replace this one.
        self._unwritten.pop(name, None)

    def try_write(self, name: str, data: bytes) -> bool:
        """Keep what this life can do without: a full disk must not stop what a node does. Says whether it is kept.

        What is not kept is written by a later `retry`.
        """
        self._unwritten[name] = data
        return self.retry()

    def put_off(self, name: str, data: Callable[[], bytes]) -> None:
        """Have something written by the next `write_put_off`, as it is then: for what changes many times a second."""
        self._put_off[name] = data

    def write_put_off(self) -> None:
        """Write what was put off, as `try_write` does. Never raises."""
        while self._put_off:
            name, data = self._put_off.popitem()
            self.try_write(name, data())

    def retry(self) -> bool:
        """Write what could not be written before; whether all is kept now. Never raises."""
        try:
            while self._unwritten:
                name, data = next(iter(self._unwritten.items()))
                self.write(name, data)
                self._unwritten.pop(name, None)
        except OSError as error:
            self._health.failed(error)
            return False
        self._health.wrote()
        return True


class MeshStores:
    """The meshes that a home knows, and which one it belongs to at present."""

    def __init__(self, root: Path | None) -> None:
        """`root` None: everything in memory."""
        self._root = root
        self._current: MeshId | None = None

    def current(self) -> MeshId | None:
        """The mesh that this home was last a member of."""
        if self._root is None:
            return self._current
        try:
            text = (self._root / _CURRENT).read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return MeshId(text) if len(text) == 64 else None

    def open(self, mesh: MeshId) -> MeshStore:
        """The store of this mesh."""
        return MeshStore(None if self._root is None else self._root / mesh[:32])

    def choose(self, mesh: MeshId) -> None:
        """Make this mesh the present one."""
        self._current = mesh
        if self._root is not None:
            write_atomic(self._root / _CURRENT, mesh.encode() + b"\n", 0o600)


FOUNDER_LIFETIME = 10 * 365 * 86400
_CERTIFICATE = "certificate"
_MESH_KEY = "mesh-key"


class _InviteOrigin(msgspec.Struct):
    """Of a kept invite: whether it is the one that every start prints."""

    standing: bool = False


class Standing:
    """See the module's text. `certificate` is None until the node is admitted for the first time."""

    def __init__(self, mesh: MeshId, key: SigningKey, store: MeshStore, mesh_key: SigningKey | None) -> None:
        self.mesh = mesh
        self.key = key
        self.store = store
        self.mesh_key = mesh_key
        self.certificate: Certificate | None = None
        self.encoded = b""
        """The certificate as it travels; empty where there is none."""
        self.outdated = b""
        """A kept certificate of the older form: it admits to nothing, but the node that invited can renew it."""

    @property
    def scope(self) -> Scope | None:
        """What this node may do in the mesh; None before its first admission."""
        return self.certificate.scope if self.certificate else None

    def accept(self, certificate: Certificate) -> None:
        """Take a new certificate, and keep it."""
        self.certificate = certificate
        self.encoded = encode(certificate)
        self.outdated = b""
        self.store.try_write(_CERTIFICATE, self.encoded)

    def restore(self, now: float) -> None:
        """Take up the certificate that was kept; a founder writes itself a new one."""
        if self.refound(now):
            return
        data = self.store.read(_CERTIFICATE)
        certificate = decode_certificate(data) if data else None
        if not isinstance(certificate, Certificate) or certificate.node != self.key.node_id:
            return
        if any(link.outdated for link in certificate.links):
            self.outdated = encode(certificate)
        else:
            self.certificate, self.encoded = certificate, encode(certificate)

    def refound(self, now: float) -> bool:
        """A founder writes itself a certificate where it has none, or one past half its life. Says whether it did.

        Its clock may have been wrong when the last one was written.
        """
        own = self.certificate
        if self.mesh_key is None or (own is not None and own.expires - now > FOUNDER_LIFETIME / 2):
            return False
        self.accept(
            founder_certificate(self.mesh_key.public, self.key.public, int(now) + FOUNDER_LIFETIME, self.mesh_key.sign)
        )
        return True


def read_tokens(tokens: tuple[str, ...]) -> list[Invite | Refusal]:
    """Parse tokens in order; nothing is verified yet."""
    return [parse_invite(token) for token in tokens]


def take_place(
    stores: MeshStores, key: SigningKey, invites: list[Invite], now: float, *, client: bool, found_new: bool = False
) -> Standing:
    """Which mesh this node is in: that of the first invite, else the one it was last in, else a new one.

    `found_new`: a mesh that it was last in counts only where it founded it.

    Raises:
        MeshError: a client that was not told which mesh.
    """
    if invites:
        mesh = invites[0].mesh_id
        standing = _open(stores, mesh, key)
    elif (mesh := stores.current()) is not None:
        standing = _open(stores, mesh, key)
        if standing.mesh_key is None and (found_new or standing.store.read(_CERTIFICATE) is None):
            # It was told to join once, and never got in: that leaves it no claim on that mesh.
            standing = _found(stores, key)
    elif client:
        raise MeshError(
            code="no_mesh",
            message="A client needs a mesh to ask.",
            hint="Give it an invite: `mesh-llm --client --join TOKEN`.",
            status=400,
        )
    else:
        standing = _found(stores, key)
    standing.restore(now)
    stores.choose(standing.mesh)
    return standing


def has_company(stores: MeshStores) -> bool:
    """Whether this home belongs to a mesh with others in it, as far as it remembers.

    A mesh that was founded here because there was no other, and that nobody ever joined or was invited to by hand,
    is nothing to keep to.
    """
    mesh = stores.current()
    if mesh is None:
        return False
    store = stores.open(mesh)
    if store.read(_MESH_KEY) is None:
        return store.read(_CERTIFICATE) is not None
    return store.read(PEERS_FILE) is not None or _invited_by_hand(store)


def _invited_by_hand(store: MeshStore) -> bool:
    try:
        kept = msgspec.json.decode(store.read(INVITES_FILE) or b"[]", type=list[_InviteOrigin])
    except msgspec.MsgspecError:
        return True
    return any(not invite.standing for invite in kept)


def refused_tokens(parsed: list[Invite | Refusal]) -> list[MeshError]:
    """What to tell the user of tokens that could not even be read."""
    return [refusal_error(entry) for entry in parsed if isinstance(entry, Refusal)]


def _open(stores: MeshStores, mesh: MeshId, key: SigningKey) -> Standing:
    store = stores.open(mesh)
    secret = store.read(_MESH_KEY)
    mesh_key = parse(secret, f"{_MESH_KEY} of mesh {mesh[:10]}") if secret else None
    return Standing(mesh, key, store, mesh_key)


def _found(stores: MeshStores, key: SigningKey) -> Standing:
    mesh_key = SigningKey.generate()
    store = stores.open(mesh_key.mesh_id)
    store.write(_MESH_KEY, render(mesh_key))
    _log.info("founded a mesh", mesh=mesh_key.mesh_id[:10])
    return Standing(mesh_key.mesh_id, key, store, mesh_key)
