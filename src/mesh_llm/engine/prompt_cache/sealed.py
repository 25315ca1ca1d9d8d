"""One saved prompt cache as a file: encrypted and authenticated piece by piece, so that neither side needs it whole.

The file is a magic, a salt, a sealed header, and the state in sealed pieces of 1 MiB (AES-256-GCM). Its key is derived
from the node's key and the salt (HKDF-SHA256), so no nonce is ever used twice under a key. A piece's nonce is its
number, and whether it is the last: pieces cannot be exchanged, left out or added (the STREAM construction of Hoang,
Reyhanitabar, Rogaway and Vizár, 2015).
"""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from mesh_llm.core.performance.prompt_cache import Mark, SavedPrompt

MAGIC = b"MLPC0001"
PIECE_BYTES = 1 << 20
MOST_HEADER = 1 << 16
_SALT_BYTES = 16
_TAG_BYTES = 16
_LENGTH_BYTES = 4
_HEADER_NUMBER = (1 << 64) - 1
_ROOT = b"mesh-llm prompt caches"
_FILE = b"mesh-llm prompt cache file"


class DamagedError(Exception):
    """A file is not one that this node wrote, or not whole; the text says what is wrong."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds.

    Attributes:
        identity: of the model's content, the engine's build and the settings that the state depends on, 32 bytes.
        marks: the beginnings of the prompt, shortest first.
        tokens: tokens in the state.
        size: bytes of the state.
        read_speed: tokens a second at which this prompt was read; 0: not measured.
        move_speed: bytes a second from the machines of a split model, when it was saved; 0: it was on this one.
        model: the model's name, for people.
    """

    identity: bytes
    marks: tuple[Mark, ...]
    tokens: int
    size: int
    read_speed: float = 0.0
    move_speed: float = 0.0
    model: str = ""

    @property
    def saved(self) -> SavedPrompt:
        """What the core decides by."""
        return SavedPrompt(marks=self.marks, tokens=self.tokens, size=self.size)


def root_key(secret: bytes) -> bytes:
    """The key of all files, derived from the node's secret key."""
    return _derived(secret, b"", _ROOT)


def sealed(file: BinaryIO, header: Header, state: BinaryIO, key: bytes) -> int:
    """Write a file; returns its bytes. `state`: exactly `header.size` bytes from its position. Raises OSError."""
    salt = os.urandom(_SALT_BYTES)
    cipher = _cipher(_derived(key, salt, _FILE))
    about = cipher.encrypt(_nonce(_HEADER_NUMBER, last=False), msgspec.msgpack.encode(header), MAGIC + salt)
    written = file.write(MAGIC + salt + len(about).to_bytes(_LENGTH_BYTES, "little") + about)
    for number, size, last in _pieces(header.size):
        piece = state.read(size)
        if len(piece) != size:
            raise OSError(f"the state has {header.size} bytes, and ended before")
        written += file.write(cipher.encrypt(_nonce(number, last=last), piece, None))
    return written


def read_header(file: BinaryIO, key: bytes) -> Header:
    """Read and check a file's beginning. Raises DamagedError, OSError."""
    return _opened(file, key)[0]


def unseal(file: BinaryIO, state: BinaryIO, key: bytes) -> Header:
    """Check a whole file, and write its state. What was written before an error is worth nothing.

    Raises:
        DamagedError: it is not one of this node's, or it was changed or cut.
        OSError: the file cannot be read, or the state not written.
    """
    from cryptography.exceptions import InvalidTag

    header, cipher = _opened(file, key)
    for number, size, last in _pieces(header.size):
        data = file.read(size + _TAG_BYTES)
        try:
            piece = cipher.decrypt(_nonce(number, last=last), data, None)
        except (InvalidTag, ValueError) as error:
            raise DamagedError(f"its piece {number} was changed, or is missing") from error
        state.write(piece)
    if file.read(1):
        raise DamagedError("something was added at its end")
    state.flush()
    return header


def sealed_bytes(size: int) -> int:
    """About how many bytes the file of a state has."""
    pieces = max(1, -(-size // PIECE_BYTES))
    return size + pieces * _TAG_BYTES + 4096


def _opened(file: BinaryIO, key: bytes) -> tuple[Header, Any]:
    from cryptography.exceptions import InvalidTag

    if file.read(len(MAGIC)) != MAGIC:
        raise DamagedError("it is no prompt cache")
    salt, length = file.read(_SALT_BYTES), int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > MOST_HEADER:
        raise DamagedError("its header is too long")
    cipher = _cipher(_derived(key, salt, _FILE))
    try:
        about = cipher.decrypt(_nonce(_HEADER_NUMBER, last=False), file.read(length), MAGIC + salt)
        return msgspec.msgpack.decode(about, type=Header), cipher
    except (InvalidTag, ValueError) as error:
        # A msgspec error is a ValueError: an authentic header of another version.
        raise DamagedError("its header was changed, or another node wrote it") from error


def _pieces(size: int) -> Iterator[tuple[int, int, bool]]:
    """Number and length of each piece, and whether it is the last. There is always one."""
    count = max(1, -(-size // PIECE_BYTES))
    for number in range(count):
        last = number == count - 1
        yield number, size - number * PIECE_BYTES if last else PIECE_BYTES, last


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(8, "little") + int(last).to_bytes(4, "little")


def _cipher(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _derived(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=32, salt=salt or None, info=purpose).derive(secret)
