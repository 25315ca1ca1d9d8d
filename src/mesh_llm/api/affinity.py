"""Which node saw a prompt's beginning before: a bounded table, so that a conversation finds its warm cache.

A prompt is taken as a chain of pieces: a conversation's messages, or blocks of a plain prompt. Each link's key is the
hash of everything up to it, so the longest known link is the longest known beginning. The next turn of a conversation
repeats the bytes of the last one, since clients send back what they sent; where one does not, only warmth is lost.
"""

from collections import OrderedDict
from hashlib import blake2b

import msgspec

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.routing import Warmth

_BLOCK = 512
_LOOKED_AT = 64
_KEPT_LAST = 3
_KEPT_FIRST = 2
_NODES_EACH = 3


class Link(msgspec.Struct, frozen=True):
    """A beginning of a prompt: its key, its length in bytes, and whether it reaches into what the user said."""

    key: bytes
    size: int
    conversation: bool


class _Prompt(msgspec.Struct):
    messages: list[msgspec.Raw] | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    role: str = ""


_prompt_decoder = msgspec.json.Decoder(_Prompt)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_message_decoder = msgspec.json.Decoder(_Message)


def links(body: bytes) -> list[Link]:
    """Cut a request's prompt into its beginnings, shortest first; at most the first two and the last 64.

    A body that holds no prompt that is understood here has none.
    """
    try:
        pieces, before, messages = _pieces(_prompt_decoder.decode(body))
        users = [messages and _is_users(piece) for piece in pieces[:_KEPT_FIRST]]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    digest = blake2b(before, digest_size=16)
    size = len(before)
    found: list[Link] = []
    for index, piece in enumerate(pieces):
        digest.update(piece)
        size += len(piece)
        if index < _KEPT_FIRST or index >= len(pieces) - _LOOKED_AT:
            conversation = index >= _KEPT_FIRST or any(users[: index + 1])
            found.append(Link(digest.copy().digest(), size, conversation))
    return found


def _pieces(request: _Prompt) -> tuple[list[bytes], bytes, bool]:
    """The chain's pieces, what stands before them in the model's context, and whether they are messages."""
    before = b"".join(bytes(part) for part in (request.tools, request.system, request.instructions))
    if request.messages is not None:
        return [bytes(message) for message in request.messages], before, True
    text = bytes(request.input) or bytes(request.prompt)
    if text.startswith(b"[") and request.input:
        return [bytes(item) for item in _list_decoder.decode(text)], before, True
    return [text[at : at + _BLOCK] for at in range(0, len(text) - _BLOCK, _BLOCK)], before, False


def _is_users(message: bytes) -> bool:
    return _message_decoder.decode(message).role not in ("system", "developer")


class Affinity:
    """The table: beginnings of prompts to the nodes that were asked with them, least recently used out first."""

    def __init__(self, entries: int = 8192) -> None:
        self._entries = entries
        self._nodes: OrderedDict[tuple[ModelName, bytes], tuple[NodeId, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def warmth(self, model: ModelName, chain: list[Link]) -> dict[NodeId, Warmth]:
        """What each node knows of a prompt: its longest known beginning."""
        known: dict[NodeId, Warmth] = {}
        for link in reversed(chain):
            for node in self._nodes.get((model, link.key), ()):
                if node not in known:
                    known[node] = Warmth(prefix_bytes=link.size, conversation=link.conversation)
        return known

    def remember(self, model: ModelName, chain: list[Link], node: NodeId) -> None:
        """A node was asked with this prompt."""
        for link in {link.key: link for link in (*chain[:_KEPT_FIRST], *chain[-_KEPT_LAST:])}.values():
            key = (model, link.key)
            nodes = self._nodes.pop(key, ())
            self._nodes[key] = (node, *(other for other in nodes if other != node))[:_NODES_EACH]
        while len(self._nodes) > self._entries:
            self._nodes.popitem(last=False)
