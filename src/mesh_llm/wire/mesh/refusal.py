"""Why a node, an invite or a certificate is not accepted: one value per cause, each with words for a person."""

from enum import StrEnum
from typing import Annotated

import msgspec

from mesh_llm.core.types.errors import MeshError

MAX_DETAIL = 200


class Reason(StrEnum):
    """The causes that two sides must agree on; part of the protocol."""

    MALFORMED = "malformed"
    EXPIRED = "expired"
    REVOKED = "revoked"
    OTHER_MESH = "other_mesh"
    OTHER_VERSION = "other_version"
    USES_EXHAUSTED = "uses_exhausted"
    WRONG_SCOPE = "wrong_scope"
    NOT_ISSUER = "not_issuer"
    FORGED = "forged"
    NOTHING_SHOWN = "nothing_shown"
    BUSY = "busy"
    PENDING = "pending"
    DENIED = "denied"


class Subject(StrEnum):
    """What is at fault."""

    INVITE = "invite"
    CERTIFICATE = "certificate"
    REVOCATION = "revocation"
    NODE = "node"
    REQUEST = "request"
    """To be let in without an invite."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """One refused thing. `detail` adds a fact for people, such as a date; never relied on by a program."""

    reason: Reason
    subject: Subject = Subject.INVITE
    detail: Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)] = ""

    @property
    def permanent(self) -> bool:
        """Whether trying the same again is pointless."""
        if self.reason is Reason.OTHER_VERSION and self.subject is Subject.CERTIFICATE:
            # The node that invited can renew it; another one cannot.
            return False
        return self.reason not in {Reason.BUSY, Reason.NOT_ISSUER, Reason.NOTHING_SHOWN, Reason.PENDING}


_NEW_INVITE = "Ask for a new one: `mesh-llm invite create` on a node of the mesh."
_NEW_CERTIFICATE = "Join again with a new invite: `mesh-llm --join TOKEN`."

_TEXTS: dict[tuple[Subject, Reason], tuple[str, str]] = {
    (Subject.INVITE, Reason.MALFORMED): (
        "The invite is malformed",
        "Copy the whole token again, from `mesh2` to its last character: a part is missing or mistyped.",
    ),
    (Subject.INVITE, Reason.EXPIRED): ("The invite has expired", _NEW_INVITE),
    (Subject.INVITE, Reason.REVOKED): ("The invite was revoked", _NEW_INVITE),
    (Subject.INVITE, Reason.OTHER_MESH): (
        "The invite is for another mesh",
        "Use an invite of this mesh, or a MESH_LLM_HOME of its own for each mesh.",
    ),
    (Subject.INVITE, Reason.OTHER_VERSION): (
        "The invite was made by another version of mesh-llm",
        "Bring both nodes to the same version of mesh-llm, then make a new invite.",
    ),
    (Subject.INVITE, Reason.USES_EXHAUSTED): ("The invite was already used as often as it may be", _NEW_INVITE),
    (Subject.INVITE, Reason.WRONG_SCOPE): (
        "The invite gives more than its issuer may give",
        "Ask for one from a node with a wider scope.",
    ),
    (Subject.INVITE, Reason.NOT_ISSUER): (
        "The invite is limited in uses: only the node that made it can accept it",
        "Start that node, or ask for an invite without a limit of uses.",
    ),
    (Subject.INVITE, Reason.FORGED): ("The invite is not signed by its mesh", _NEW_INVITE),
    (Subject.CERTIFICATE, Reason.MALFORMED): ("The certificate is malformed", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.EXPIRED): ("This node's admission has expired", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.REVOKED): ("This node's admission was revoked", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.OTHER_MESH): ("The node belongs to another mesh", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.OTHER_VERSION): (
        "This node was admitted by an older version of mesh-llm, which did not write down whose invite it came by",
        "Start the node that invited this one, it renews the admission; or join again: `mesh-llm --join TOKEN`.",
    ),
    (Subject.CERTIFICATE, Reason.WRONG_SCOPE): (
        "This node was not admitted for that",
        "Join again with an invite of a wider scope: `mesh-llm invite create --scope serve|split`.",
    ),
    (Subject.CERTIFICATE, Reason.FORGED): ("The certificate is not signed by its mesh", _NEW_CERTIFICATE),
    (Subject.NODE, Reason.OTHER_VERSION): (
        "The other node runs a version of mesh-llm that this one cannot speak with",
        "Bring both nodes to the same version.",
    ),
    (Subject.NODE, Reason.OTHER_MESH): ("The node belongs to another mesh", "Use an invite of that mesh."),
    (Subject.NODE, Reason.NOTHING_SHOWN): ("The mesh admits only invited nodes", "Join with `mesh-llm --join TOKEN`."),
    (Subject.NODE, Reason.BUSY): ("The node accepts no more connections for now", "It will be tried again."),
    (Subject.REQUEST, Reason.PENDING): (
        "Nobody has answered the request to join yet",
        "Allow it on the machine that was asked: `mesh-llm approve`.",
    ),
    (Subject.REQUEST, Reason.DENIED): (
        "The request to join was denied",
        "Ask the owner of that mesh for an invite: `mesh-llm invite create` there, `mesh-llm --join TOKEN` here.",
    ),
    (Subject.REQUEST, Reason.EXPIRED): (
        "Nobody answered the request to join in time",
        "Ask again, and allow it on the machine that is asked: `mesh-llm approve`.",
    ),
    (Subject.REQUEST, Reason.BUSY): (
        "Too many requests to join wait for an answer there",
        "Answer them on that machine: `mesh-llm approve`; or join with an invite.",
    ),
    (Subject.NODE, Reason.MALFORMED): (
        "The node does not speak this protocol",
        "Bring both nodes to the same version.",
    ),
}


def describe(refusal: Refusal) -> MeshError:
    """The error that tells a user about it; its code is `SUBJECT_REASON`, as in `invite_expired`."""
    text, hint = _TEXTS.get((refusal.subject, refusal.reason), (f"The {refusal.subject} was refused", _NEW_INVITE))
    detail = f" ({refusal.detail})" if refusal.detail else ""
    return MeshError(code=f"{refusal.subject}_{refusal.reason}", message=f"{text}{detail}.", hint=hint, status=403)
