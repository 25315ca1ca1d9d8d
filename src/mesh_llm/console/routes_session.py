"""Calls about who is signed in: what anybody may see, links and sessions for the page. See `sessions`."""

import msgspec

from mesh_llm import __version__
from mesh_llm.console.call import Access, Asked, Asker, Call, Desk, WithHeaders
from mesh_llm.console.requests import SignInBody
from mesh_llm.console.sessions import CODE_SECONDS, SESSION_SECONDS
from mesh_llm.core.console_values import SessionKey, SessionState, SignedOut, SignInLink
from mesh_llm.core.errors import MeshError

CODE_MARK = "#sign-in="
"""Before the code in a link: what follows # is not sent to any server, and in no log of a proxy."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """All that this port says to somebody who is not known: a node is here. Whether it is ready: `:9337/health`."""

    status: str = "ok"
    version: str = __version__


async def _health(_: Desk, __: Asked) -> Health:
    return Health()


async def _state(desk: Desk, _: Asked) -> SessionState:
    return SessionState(sessions=len(desk.sessions))


async def _sign_in(desk: Desk, asked: Asked) -> WithHeaders:
    body = await asked.body(SignInBody)
    known = asked.asker is not Asker.ANYBODY
    if not body.code and not known:
        raise MeshError(
            code="sign_in_required",
            message="This console opens with a link.",
            hint="Type mesh-llm console on the node's machine.",
            status=401,
        )
    session = desk.sessions.open() if known else desk.sessions.redeem(body.code)
    return WithHeaders(
        SessionKey(key=session.key), {"set-cookie": _cookie(desk, asked, session.cookie, SESSION_SECONDS)}
    )


async def _sign_out(desk: Desk, asked: Asked) -> WithHeaders:
    cookie = asked.cookie(desk.cookie)
    before = len(desk.sessions)
    desk.sessions.end(cookie)
    ended = SignedOut(ended=before - len(desk.sessions))
    return WithHeaders(ended, {"set-cookie": _cookie(desk, asked, "", 0)})


async def _sign_out_all(desk: Desk, _: Asked) -> SignedOut:
    return SignedOut(ended=desk.sessions.end_all())


async def _link(desk: Desk, _: Asked) -> SignInLink:
    return sign_in_link(desk)


def sign_in_link(desk: Desk) -> SignInLink:
    """A new link. Raises MeshError(no_page)."""
    if not desk.pages:
        raise MeshError(
            code="no_page",
            message="This node was started with --headless: it has no page.",
            hint="Start it without --headless, or use mesh-llm status --watch.",
            status=409,
        )
    code = desk.sessions.new_code()
    return SignInLink(
        urls=tuple(f"{page}{CODE_MARK}{code}" for page in desk.pages), code=code, expires_seconds=CODE_SECONDS
    )


def _cookie(desk: Desk, asked: Asked, value: str, seconds: float) -> str:
    """The cookie of a session; only over TLS, where the page came that way."""
    secure = "; Secure" if (asked.header("origin") or "").lower().startswith("https:") else ""
    return f"{desk.cookie}={value}; Path=/; Max-Age={seconds:.0f}; HttpOnly; SameSite=Strict{secure}"


CALLS = (
    Call(
        method="GET",
        path="/api/health",
        name="health",
        summary="A node is here. Anybody on this machine may ask.",
        handler=_health,
        answer=Health,
        access=Access.OPEN,
    ),
    Call(
        method="GET",
        path="/api/session",
        name="session",
        summary="Whether the request shows an open session, or is its user's in another way.",
        handler=_state,
        answer=SessionState,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/session",
        name="sign_in",
        summary="Open a session with the code of a link, or with what shows the user in another way.",
        handler=_sign_in,
        answer=SessionKey,
        access=Access.OPEN,
        status=201,
        body=SignInBody,
    ),
    Call(
        method="DELETE",
        path="/api/session",
        name="sign_out",
        summary="End the session that the request shows.",
        handler=_sign_out,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="DELETE",
        path="/api/sessions",
        name="sign_out_all",
        summary="End all sessions of browsers, and make all links useless that were not used.",
        handler=_sign_out_all,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/sign-in-links",
        name="create_sign_in_link",
        summary="Make a link that opens the page signed in, once, within 15 minutes.",
        handler=_link,
        answer=SignInLink,
        access=Access.CHANGE,
        status=201,
    ),
)
