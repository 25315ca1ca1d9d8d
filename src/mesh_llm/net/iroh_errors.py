"""What iroh's errors say. `str(IrohError)` is empty: kind and message are methods."""

import re

import iroh

from mesh_llm.wire.frames import CloseCode, ResetCode

_CODE = re.compile(r"(?:Reset|Stopped)\((\d+)\)")
_CLOSED_BY_PEER = re.compile(r"closed by peer: (?P<reason>.*) \(code (?P<code>\d+)\)", re.DOTALL)
_LOST = re.compile(r"ConnectionLost\((?P<how>\w+)")
_HOW = {
    "ApplicationClosed": "the other node closed it",
    "ConnectionClosed": "the other node closed it",
    "LocallyClosed": "this node closed it",
    "Reset": "the other node does not know it any more",
    "TimedOut": "the other node did not answer in time",
}
_FIRST_CAUSE = re.compile(r"Caused by:.*\n\s+(?P<cause>[^\n/]+)$", re.DOTALL)


class StreamResetError(ConnectionResetError):
    """The peer dropped the stream. `code` is its ResetCode, or the bare number where this version has no name."""

    def __init__(self, code: int) -> None:
        self.code = code
        try:
            name = ResetCode(code).name.lower()
        except ValueError:
            name = str(code)
        super().__init__(f"the peer dropped the stream ({name})")


def reason_of(error: iroh.IrohError) -> str:
    """One line for people."""
    message = error.message().strip()
    lost = _LOST.search(message)
    if lost:
        return _HOW.get(lost["how"], "the connection broke")
    cause = _FIRST_CAUSE.search(message)
    line = cause["cause"].strip() if cause else message.splitlines()[0]
    return line.split(" (/")[0] or error.kind().name.lower()


def stream_failure(error: iroh.IrohError) -> ConnectionError:
    """The error of a read or write as the one that ByteStream promises."""
    code = _CODE.fullmatch(error.message())
    if code:
        return StreamResetError(int(code[1]))
    return ConnectionResetError(reason_of(error))


def close_reason(text: str | None) -> tuple[str, CloseCode | None]:
    """What `Connection.close_reason()` tells: words, and the peer's code if it said one that we know."""
    if text is None:
        return "connection lost", None
    match = _CLOSED_BY_PEER.fullmatch(text.strip())
    if match is None:
        return text.strip() or "connection lost", None
    words = match["reason"] or "closed by the peer"
    try:
        return words, CloseCode(int(match["code"]))
    except ValueError:
        return words, None
