"""Find one small field of a multipart/form-data body (RFC 7578) without taking the rest apart."""

import re

_BOUNDARY = re.compile(rb'(?i);\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))')
_NAME = re.compile(rb'(?i);\s*name="([^"\r\n]*)"')
_FILE = re.compile(rb"(?i);\s*filename\*?=")
_MOST_PARTS = 256
_MOST_HEAD_BYTES = 4096


def boundary_of(content_type: bytes) -> bytes | None:
    """Return the boundary that a Content-Type names, or None if it is not multipart/form-data with one."""
    if not content_type.lower().startswith(b"multipart/form-data"):
        return None
    match = _BOUNDARY.search(content_type)
    return (match.group(1) or match.group(2)) if match else None


def form_field(body: bytes, boundary: bytes, name: bytes, limit: int = 1024) -> bytes | None:
    """Return the value of the first plain field of that name, at most `limit` bytes long; None if there is none.

    Files are stepped over by searching for the next delimiter; at most 256 parts are looked at.
    """
    delimiter = b"\r\n--" + boundary
    position = 0 if body.startswith(delimiter[2:]) else body.find(delimiter) + 2
    if position == 1:
        return None
    position += len(delimiter) - 2
    for _ in range(_MOST_PARTS):
        if body[position : position + 2] != b"\r\n":
            return None
        start = position + 2
        head_end = body.find(b"\r\n\r\n", position, start + _MOST_HEAD_BYTES)
        if head_end < 0:
            return None
        end = body.find(delimiter, head_end + 2)
        if end < 0:
            return None
        if _is_field(body[start:head_end], name):
            value = body[head_end + 4 : end]
            return value if len(value) <= limit else None
        position = end + len(delimiter)
    return None


def _is_field(head: bytes, name: bytes) -> bool:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            match = _NAME.search(value)
            return match is not None and match.group(1) == name and not _FILE.search(value)
    return False
