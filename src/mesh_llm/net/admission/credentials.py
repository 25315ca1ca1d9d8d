"""Who this node is: its key, its certificate, and the files that keep what it knows of its mesh."""

import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import iroh
import msgspec
import structlog

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.wire.codec import KEY_BYTES, encode
from mesh_llm.wire.mesh.admission import Refusal, Scope
from mesh_llm.wire.mesh.certificates import Certificate, Link, decode_certificate, founder_certificate
from mesh_llm.wire.mesh.invites import Invite, parse_invite

EPHEMERAL_VARIABLE = "MESH_LLM_EPHEMERAL_KEY"


class SigningKey:
    """An Ed25519 secret key (RFC 8032), through iroh. `sign` is a Sign of wire.mesh.frames."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 bytes."""
        self.secret = secret
        self._key = iroh.SecretKey.from_bytes(secret)
        self.public: bytes = bytes(self._key.public().to_bytes())

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new one from the operating system's randomness."""
        return cls(os.urandom(KEY_BYTES))

    @property
    def node_id(self) -> NodeId:
        """The public key as a node's name."""
        return NodeId(self.public.hex())

    @property
    def mesh_id(self) -> MeshId:
        """The public key as a mesh's name."""
        return MeshId(self.public.hex())

    def sign(self, payload: bytes) -> bytes:
        """Sign these bytes; 64 bytes."""
        return bytes(self._key.sign(payload).to_bytes())

    def __repr__(self) -> str:
        return f"SigningKey({self.public.hex()[:10]})"


@lru_cache(maxsize=4096)
def _public(key: bytes) -> iroh.EndpointId:
    return iroh.EndpointId.from_bytes(key)


def verify(key: bytes, payload: bytes, signature: bytes) -> bool:
    """Whether `key` signed `payload`: a Verify of wire.mesh.frames. Never raises."""
    try:
        _public(key).verify(payload, iroh.Signature.from_bytes(signature))
    except iroh.IrohError:
        return False
    return True


def wants_ephemeral(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants a key that is forgotten at exit."""
    return environment.get(EPHEMERAL_VARIABLE, "") not in {"", "0"}


def node_key(home: Home, *, ephemeral: bool) -> SigningKey:
    """This node's key: kept in the home and made at the first start; or a new one for this run only."""
    return SigningKey.generate() if ephemeral else load_or_make_key(home.key)


def load_key(path: Path) -> SigningKey | None:
    """Read a key file; None if there is none. Raises MeshError(key_unreadable)."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:
        # The home belongs to another user: the caller that opens the home reports it.
        raise
    except OSError as error:
        raise _unreadable(str(path), str(error)) from None
    key = parse_key(text, str(path))
    # Others must not read the key. A copying tool may have widened its mode: mend that without a message.
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return key


def parse_key(text: bytes, where: str) -> SigningKey:
    """Read a stored secret: 64 hex digits. Raises MeshError(key_unreadable), which names `where`."""
    try:
        secret = bytes.fromhex(text.decode("ascii").strip())
    except ValueError as error:
        raise _unreadable(where, str(error)) from None
    if len(secret) != KEY_BYTES:
        raise _unreadable(where, f"{len(secret)} bytes instead of {KEY_BYTES}")
    return SigningKey(secret)


def key_text(key: SigningKey) -> bytes:
    """A secret as it is stored."""
    return key.secret.hex().encode() + b"\n"


def load_or_make_key(path: Path) -> SigningKey:
    """Read a key file, or make one with mode 0600."""
    key = load_key(path)
    if key is None:
        key = SigningKey.generate()
        save_key(path, key)
    return key


def save_key(path: Path, key: SigningKey) -> None:
    """Write a key file with mode 0600."""
    write_atomic(path, key_text(key), 0o600)


def _unreadable(where: str, reason: str) -> MeshError:
    return MeshError(
        code="key_unreadable",
        message=f"The key file {where} cannot be used: {reason}.",
        hint="Put the right file back, or move it away to become a new node.",
    )


PEERS_FILE = "peers.json"
"""Last-known peers."""
INVITES_FILE = "invites.json"
"""Invites that this node issued."""
_CURRENT = "current"
_MESH_ID = re.compile(rb"[0-9a-f]{64}")

_log = structlog.get_logger(__name__)


class MeshStore:
    """The files of one mesh, or memory for a node that must leave nothing behind. Writing is atomic, mode 0600."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: dict[str, bytes] = {}
        self._unwritten: dict[str, bytes] = {}
        self._put_off: dict[str, Callable[[], bytes]] = {}
        self._health = WriteHealth("what is known of the mesh", "It is written as soon as that works.")

    def read(self, name: str) -> bytes | None:
        """The content of this name; None if nothing was written."""
        if self._directory is None:
            return self._memory.get(name)
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file. Raises OSError."""
        if self._directory is None:
            self._memory[name] = data
        else:
            write_atomic(self._directory / name, data, 0o600)
        # An older content of the same file must not replace this one.
        self._unwritten.pop(name, None)

    def try_write(self, name: str, data: bytes) -> bool:
        """Write a file that the running node does not need: a full disk must not stop the node.

        Returns False if the disk refuses; a later `retry` writes it then.
        """
        self._unwritten[name] = data
        return self.retry()

    def write_later(self, name: str, data: Callable[[], bytes]) -> None:
        """Write a file at the next `flush`, with what `data` returns then: for content that changes often."""
        self._put_off[name] = data

    def flush(self) -> None:
        """Write what `write_later` left, as `try_write` does. Never raises."""
        while self._put_off:
            name, data = self._put_off.popitem()
            self.try_write(name, data())

    def retry(self) -> bool:
        """Write what could not be written before; returns whether all is written now. Never raises."""
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
    """The meshes that a home knows, and which of them is the current one."""

    def __init__(self, root: Path | None) -> None:
        """`root` None: everything in memory."""
        self._root = root
        self._current: MeshId | None = None

    def current(self) -> MeshId | None:
        """The mesh that this home was last a member of."""
        if self._root is None:
            return self._current
        try:
            text = (self._root / _CURRENT).read_bytes().strip()
        except FileNotFoundError:
            return None
        if _MESH_ID.fullmatch(text) is None:
            _log.warning("the last mesh is forgotten: its record is damaged", file=str(self._root / _CURRENT))
            return None
        return MeshId(text.decode())

    def open(self, mesh: MeshId) -> MeshStore:
        """The store of this mesh."""
        return MeshStore(None if self._root is None else self._root / mesh[:32])

    def holds(self, mesh: MeshId) -> bool:
        """Whether this home founded the mesh, or was admitted to it."""
        store = self.open(mesh)
        return any(store.read(name) is not None for name in (_MESH_KEY, _CERTIFICATE))

    def choose(self, mesh: MeshId) -> None:
        """Make this mesh the current one."""
        self._current = mesh
        if self._root is not None:
            write_atomic(self._root / _CURRENT, mesh.encode() + b"\n", 0o600)


FOUNDER_LIFETIME = 10 * 365 * 86400
_CERTIFICATE = "certificate"
_EARLIER_CERTIFICATE = "earlier-certificate"
_MESH_KEY = "mesh-key"


class _InviteOrigin(msgspec.Struct):
    """The one field of a stored invite that matters here. `standing`: every start prints this invite."""

    standing: bool = False


class Credentials:
    """A node's membership of one mesh: its key and certificate, and the mesh's own key if this node founded it."""

    def __init__(self, mesh: MeshId, key: SigningKey, store: MeshStore, mesh_key: SigningKey | None) -> None:
        self.mesh = mesh
        self.key = key
        self.store = store
        self.mesh_key = mesh_key
        self.certificate: Certificate | None = None
        """None until the first admission."""
        self.encoded = b""
        """The encoded certificate; empty if there is none."""
        self.earlier: Certificate | None = None
        """The admission before a grant by somebody else: it counts again if the present one ends."""
        self.outdated = b""
        """A stored certificate of the older form: it admits to nothing, but the inviter can renew it."""
        self.ceiling: Callable[[tuple[Link, ...]], Scope] = lambda _: Scope.SPLIT
        """The widest scope that revocations leave to a certificate of these links."""

    @property
    def scope(self) -> Scope | None:
        """What this node may do in the mesh; None before its first admission."""
        own = self.certificate
        return min(own.scope, self.ceiling(own.links)) if own else None

    def accept(self, certificate: Certificate, earlier: Certificate | None = None) -> None:
        """Use and store a new certificate, and the earlier one to which this node can return."""
        # First: a crash in between leaves the present one as it was.
        self.keep_earlier(earlier)
        self.certificate = certificate
        self.encoded = encode(certificate)
        self.outdated = b""
        self.store.try_write(_CERTIFICATE, self.encoded)

    def keep_earlier(self, certificate: Certificate | None) -> None:
        """Store the admission to which this node can return; None: there is none."""
        if certificate != self.earlier:
            self.earlier = certificate
            self.store.try_write(_EARLIER_CERTIFICATE, encode(certificate) if certificate else b"")

    def restore(self, now: float) -> None:
        """Load the stored certificate; a founder writes itself one if need be."""
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
        data = self.store.read(_EARLIER_CERTIFICATE)
        earlier = decode_certificate(data) if data else None
        if isinstance(earlier, Certificate) and earlier.node == self.key.node_id:
            self.earlier = earlier

    def refound(self, now: float) -> bool:
        """Write a founder's certificate if it has none or the old one is past half its life; returns whether it did.

        The clock may have been wrong when the old one was written.
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


def open_credentials(
    stores: MeshStores, key: SigningKey, invites: list[Invite], now: float, *, client: bool, found_new: bool = False
) -> Credentials:
    """Choose this node's mesh: that of the first invite, else the last one, else a new one.

    `found_new`: the last one counts only if this node founded it.

    Raises:
        MeshError(no_mesh): a client without an invite that was in no mesh before.
    """
    if invites:
        mesh = invites[0].mesh_id
        credentials = _open(stores, mesh, key)
    elif (mesh := stores.current()) is not None:
        credentials = _open(stores, mesh, key)
        if credentials.mesh_key is None and (found_new or credentials.store.read(_CERTIFICATE) is None):
            # An invite named that mesh once, but no node of it admitted this one: it is no member.
            credentials = _found(stores, key)
    elif client:
        raise MeshError(
            code="no_mesh",
            message="A client needs a mesh to ask.",
            hint="Give it an invite: `mesh-llm --client --join TOKEN`.",
            status=400,
        )
    else:
        credentials = _found(stores, key)
    credentials.restore(now)
    stores.choose(credentials.mesh)
    return credentials


def has_other_members(stores: MeshStores) -> bool:
    """Whether this home belongs to a mesh that has, or may have, other members.

    A mesh that was founded here only because there was no other, without peers and without an invite made by hand, does
    not count.
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
    except UNREADABLE:
        return True
    return any(not invite.standing for invite in kept)


def _open(stores: MeshStores, mesh: MeshId, key: SigningKey) -> Credentials:
    store = stores.open(mesh)
    secret = store.read(_MESH_KEY)
    mesh_key = parse_key(secret, f"{_MESH_KEY} of mesh {mesh[:10]}") if secret else None
    return Credentials(mesh, key, store, mesh_key)


def _found(stores: MeshStores, key: SigningKey) -> Credentials:
    mesh_key = SigningKey.generate()
    store = stores.open(mesh_key.mesh_id)
    store.write(_MESH_KEY, key_text(mesh_key))
    _log.info("founded a mesh", mesh=mesh_key.mesh_id[:10])
    return Credentials(mesh_key.mesh_id, key, store, mesh_key)
