"""Sessions of browsers: signing in and out, and what a stranger may ask."""

from mesh_llm.console.auth import CODE_SECONDS, SESSION_SECONDS, Access, Caller
from mesh_llm.console.calls import Backend, Call, CallRequest, WithHeaders
from mesh_llm.console.schema import Health, SessionKey, SessionState, SignedOut, SignInBody, SignInLink
from mesh_llm.core.types.errors import MeshError

CODE_MARK = "#sign-in="
"""Before the code in a link. Browsers do not send what follows `#`, so no proxy logs it."""


async def _health(_: Backend, __: CallRequest) -> Health:
    return Health()


async def _state(backend: Backend, _: CallRequest) -> SessionState:
    return SessionState(sessions=backend.sessions.count)


async def _sign_in(backend: Backend, request: CallRequest) -> WithHeaders:
    body = await request.body(SignInBody)
    proved = request.caller is not Caller.ANYBODY
    if not body.code and not proved:
        raise MeshError(
            code="sign_in_required",
            message="This console opens with a link.",
            hint="Type mesh-llm console on the node's machine.",
            status=401,
        )
    session = backend.sessions.open() if proved else backend.sessions.redeem(body.code)
    return WithHeaders(
        SessionKey(key=session.key), {"set-cookie": _cookie(backend, request, session.cookie, SESSION_SECONDS)}
    )


async def _sign_out(backend: Backend, request: CallRequest) -> WithHeaders:
    cookie = request.http.cookies.get(backend.cookie, "")
    before = backend.sessions.count
    backend.sessions.end(cookie)
    ended = SignedOut(ended=before - backend.sessions.count)
    return WithHeaders(ended, {"set-cookie": _cookie(backend, request, "", 0)})


async def _sign_out_all(backend: Backend, _: CallRequest) -> SignedOut:
    return SignedOut(ended=backend.sessions.end_all())


async def _link(backend: Backend, _: CallRequest) -> SignInLink:
    return sign_in_link(backend)


def sign_in_link(backend: Backend) -> SignInLink:
    """A new link. Raises MeshError(no_page)."""
    if not backend.pages:
        raise MeshError(
            code="no_page",
            message="This node was started with --headless: it has no page.",
            hint="Start it without --headless, or use mesh-llm status --watch.",
            status=409,
        )
    code = backend.sessions.new_code()
    return SignInLink(
        urls=tuple(f"{page}{CODE_MARK}{code}" for page in backend.pages), code=code, expires_seconds=CODE_SECONDS
    )


def _cookie(backend: Backend, request: CallRequest, value: str, seconds: float) -> str:
    """A session's Set-Cookie header. `Secure` if the page came over TLS."""
    secure = "; Secure" if request.http.headers.get("origin", "").lower().startswith("https:") else ""
    return f"{backend.cookie}={value}; Path=/; Max-Age={seconds:.0f}; HttpOnly; SameSite=Strict{secure}"


SESSION_CALLS = (
    Call(
        method="GET",
        path="/api/health",
        name="health",
        summary="Whether a node is here. Everybody on this machine may ask.",
        handler=_health,
        answer=Health,
        access=Access.OPEN,
    ),
    Call(
        method="GET",
        path="/api/session",
        name="session",
        summary="Whether the request shows an open session, or another proof of its user.",
        handler=_state,
        answer=SessionState,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/session",
        name="sign_in",
        summary="Open a session with the code of a link, or with another proof of the user.",
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
        summary="End the session of the request.",
        handler=_sign_out,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="DELETE",
        path="/api/sessions",
        name="sign_out_all",
        summary="End all sessions of browsers, and cancel all unused links.",
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
