"""Forms with files (`multipart/form-data`, RFC 7578): reads one that arrived whole, and writes one anew.

A form is written anew for an engine, so that the engine sees no field and no header that was not understood here.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

MOST_PARTS = 64
_HEAD_BYTES = 2048
_BOUNDARY = re.compile(
    r"""multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))""", re.IGNORECASE
)
_PARAMETER = re.compile(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_ESCAPE = re.compile(r"\\(.)")
_NAME = re.compile(r"[\w.\-\[\]]{1,64}", re.ASCII)


class FormError(Exception):
    """A form is not well-formed, or has too many parts. The text says what is wrong, as a clause."""


class FormPart(msgspec.Struct, frozen=True):
    """One part of a form. `filename` None: it is a field and no file."""

    name: str
    content: bytes
    filename: str | None = None


def boundary_of(content_type: bytes) -> bytes:
    """The boundary in a `content-type` header. Raises FormError where it is not that of a form."""
    found = _BOUNDARY.match(content_type.decode("latin-1").strip())
    if found is None:
        raise FormError("it has no boundary")
    return (found[1] or found[2]).encode("latin-1")


def parse_form(body: bytes, boundary: bytes) -> list[FormPart]:
    """The parts of a whole form, in order.

    Raises:
        FormError: it is not well-formed, is not complete, or has more than MOST_PARTS parts.
    """
    delimiter = b"--" + boundary
    if body.startswith(delimiter):
        position = len(delimiter)
    else:
        # A preamble may come first (RFC 2046, section 5.1.1).
        position = body.find(b"\r\n" + delimiter) + len(delimiter) + 2
        if position < len(delimiter) + 2:
            raise FormError("its boundary is not in its body")
    parts: list[FormPart] = []
    while not body.startswith(b"--", position):
        begin = body.find(b"\r\n", position, position + _HEAD_BYTES)
        end = body.find(b"\r\n" + delimiter, max(position, begin))
        if begin < 0 or body[position:begin].strip(b" \t") or end < 0:
            raise FormError("it is not complete")
        if len(parts) == MOST_PARTS:
            raise FormError(f"it has more than {MOST_PARTS} parts")
        parts.append(_part(body, begin, end))
        position = end + len(delimiter) + 2
    return parts


def _part(body: bytes, begin: int, end: int) -> FormPart:
    """The part between two boundaries; `begin`: of the line break before its first header."""
    head_end = body.find(b"\r\n\r\n", begin, min(end + 2, begin + _HEAD_BYTES))
    if head_end < 0:
        raise FormError("the head of a part is too long, or not complete")
    for line in body[begin + 2 : head_end].split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() != b"content-disposition":
            continue
        text = value.decode("utf-8", "replace")
        found = {key.lower(): _ESCAPE.sub(r"\1", raw) for key, raw in _PARAMETER.findall(text)}
        if not _NAME.fullmatch(found.get("name", "")):
            break
        return FormPart(found["name"], body[head_end + 4 : end], found.get("filename"))
    raise FormError("a part has no name")


def write_form(parts: Sequence[FormPart]) -> tuple[bytes, bytes]:
    """The `content-type` and the body of a form. Names of files are left out; a file is called `file`."""
    boundary = _free_boundary(part.content for part in parts)
    pieces: list[bytes] = []
    for part in parts:
        file = b'; filename="file"' if part.filename is not None else b""
        head = b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n' % (boundary, part.name.encode("ascii"), file)
        kind = b"Content-Type: application/octet-stream\r\n" if file else b""
        pieces += (head, kind, b"\r\n", part.content, b"\r\n")
    pieces.append(b"--%b--\r\n" % boundary)
    return b"multipart/form-data; boundary=" + boundary, b"".join(pieces)


def _free_boundary(contents: Iterable[bytes]) -> bytes:
    """A boundary that is in none of the contents: it depends on all of them."""
    digest = blake2b(digest_size=20)
    for content in contents:
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return b"mesh-llm-" + digest.hexdigest().encode("ascii")
