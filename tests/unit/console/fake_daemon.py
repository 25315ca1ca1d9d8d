"""A daemon to be managed that does nothing but remember what it was asked."""

import asyncio
from pathlib import Path

from starlette.applications import Starlette
from starlette.types import ASGIApp

from mesh_llm.console.app import ConsoleApp
from mesh_llm.console.auth import AcceptsKey, Authenticator, Sessions
from mesh_llm.console.calls import Backend
from mesh_llm.console.logs import LogReader
from mesh_llm.console.schema import MemberRevoked, MemberScope, ModelAccepted, NoticeRecord
from mesh_llm.console.status import Status, StatusModel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.records import InviteRecord


class FakeDaemon:
    """Records what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.changed = asyncio.Event()
        self.records = [NoticeRecord(id=1, at=0.0, level="info", code="ready", text="tiny is ready")]
        self.fault: BaseException | None = None
        self.uptime = 1.0
        self.health = "ready"
        self.ticks = 0
        self.built = 0

    def status(self) -> Status:
        if self.fault is not None:
            raise self.fault
        self.built += 1
        return Status(
            version="1",
            node_id="aa",
            mesh_id="bb",
            mesh_name="lab",
            name="desk",
            role="serve",
            ready=True,
            health=self.health,
            api_port=9337,
            api_base="http://localhost:9337/v1",
            token="t",
            uptime_s=self.uptime,
            pid=1,
            home="h",
            memory_bytes=1,
            memory_total_bytes=2,
            devices=("CPU",),
            engine="embedded",
            models=(StatusModel(name="tiny", status="warm"),),
            peers=(),
        )

    def notices(self, after: int = 0) -> list[NoticeRecord]:
        return [record for record in self.records if record.id > after]

    async def next_change(self, timeout: float) -> bool:
        if self.ticks:
            self.ticks -= 1
            return False
        await self.changed.wait()
        self.changed.clear()
        return True

    async def load(self, model: str) -> ModelAccepted:
        self.asked.append(("load", model))
        if model == "huge":
            raise MeshError(code="does_not_fit", message="need 55.0 GB, have 51.5 GB", hint="Add a node.", status=409)
        return ModelAccepted(model=model)

    async def drop(self, model: str, drain_seconds: float, *, rest: bool = False) -> str:
        self.asked.append(("rest" if rest else "drop", model, drain_seconds))
        return model

    async def stop(self, drain_seconds: float) -> None:
        self.asked.append(("stop", drain_seconds))

    async def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        self.asked.append(("invite", scope, lifetime_seconds, uses))
        given = scope or "split"
        return InviteRecord(id="i1", scope=given, created=0, expires=lifetime_seconds, uses_left=uses, token="tok")

    def invites(self) -> list[InviteRecord]:
        return [InviteRecord(id="i1", scope="serve", created=0, expires=1)]

    async def revoke_invite(self, invite: str) -> InviteRecord:
        return InviteRecord(id=invite, scope="serve", created=0, expires=1, revoked=True)

    async def revoke_member(self, node: str) -> MemberRevoked:
        self.asked.append(("revoke_member", node))
        return MemberRevoked(node_id="b" * 64, name=node, final=True)

    async def grant(self, node: str, scope: str) -> MemberScope:
        self.asked.append(("grant", node, scope))
        return MemberScope(node_id="b" * 64, name=node, scope=scope)


TOKEN = "secret-token"
COOKIE = "mesh-llm-aa"
PAGE = "http://127.0.0.1:3131/"


def console_app(
    daemon: FakeDaemon,
    logs: Path = Path("/nonexistent"),
    *,
    token: str = TOKEN,
    sessions: Sessions | None = None,
    accepts: AcceptsKey | None = None,
    origins: tuple[str, ...] = (),
    hosts: tuple[str, ...] = (),
    page: bool = True,
    models: ASGIApp | None = None,
) -> Starlette:
    """The console of this daemon."""
    sessions = Sessions() if sessions is None else sessions
    pages = (PAGE, *origins) if page else ()
    desk = Backend(daemon, LogReader(logs), sessions=sessions, cookie=COOKIE, pages=pages)
    authenticator = Authenticator(token, sessions, COOKIE, accepts, origins, hosts=hosts)
    return ConsoleApp(desk, authenticator, page=page, models=models).build()
