"""The worker's half of split models: takes the streams of hosts, and of other workers, and keeps the sessions.

Whether a stream may be there at all (the elected host, in the present term, of a group that this node joined) is
decided before it comes here.
"""

import asyncio

from mesh_llm.core.ports import ByteStream
from mesh_llm.split.worker_session import WorkerServices, WorkerSession
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.ggml_rpc.tunnel import decode_stream

_MOST_SESSIONS = 8


class SplitWorker:
    """All sessions for one host. One runs at a time: each may allocate all that is lent to the host.

    A host that starts its engine again opens the next session right after it has closed the one before, whose
    rpc-server may still be ending.
    """

    def __init__(self) -> None:
        self._sessions: dict[bytes, WorkerSession] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._turn = asyncio.Lock()

    @property
    def sessions(self) -> int:
        """How many are open, or wait for the one before to end."""
        return len(self._sessions)

    async def serve_rpc(self, stream: ByteStream, parameters: bytes, services: WorkerServices) -> None:
        """Serve an RPC stream until it ends; `parameters` are those of its header."""
        what = decode_stream(parameters)
        if isinstance(what, Malformed):
            stream.abort()
            return
        session = self._sessions.get(what.session)
        if not what.control:
            await (_drop(stream) if session is None else session.serve_tunnel(stream))
            return
        if session is not None or len(self._sessions) >= _MOST_SESSIONS:
            stream.abort()
            return
        session = self._sessions[what.session] = WorkerSession(stream, services)
        try:
            await self._tracked(session)
        finally:
            del self._sessions[what.session]

    async def serve_push(self, stream: ByteStream, parameters: bytes) -> None:
        """Serve a PUSH stream until it ends."""
        what = decode_stream(parameters)
        session = None if isinstance(what, Malformed) else self._sessions.get(what.session)
        await (_drop(stream) if session is None else session.serve_push(stream))

    async def close(self) -> None:
        """End all sessions."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # As in runtime.tasks: gather, cancelled itself, would cancel them again.
            await asyncio.wait(self._tasks)

    async def _tracked(self, session: WorkerSession) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            async with self._turn:
                await session.run()
        finally:
            # Also one whose turn never came: streams of its own may be waiting.
            await session.close()
            if task is not None:
                self._tasks.discard(task)


async def _drop(stream: ByteStream) -> None:
    stream.abort()
