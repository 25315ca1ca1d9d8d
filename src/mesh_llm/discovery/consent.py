"""What becomes public when a mesh is listed, in words: told once, before anything is published for the first time."""

from mesh_llm.core.publicity import Publicity

_MAY = {
    "client": "may ask your models for answers, so it uses your machines' time",
    "serve": (
        "may ask your models, and may answer requests of this mesh itself: a stranger's machine can then be given, and"
        " read, the prompts that are asked here"
    ),
    "split": (
        "may ask, answer, and share models with you: a stranger's machine can read prompts, and attack the memory of"
        " machines that lend theirs"
    ),
}


def consent_text(publicity: Publicity, relays: tuple[str, ...]) -> str:
    """Everything that strangers can read from now on, and what they may do with it."""
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
