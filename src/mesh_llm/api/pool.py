"""Idle keep-alive connections to local engines: few, and not for long."""

from collections.abc import Callable

from mesh_llm.api.engine_stream import EngineStream


class IdlePool:
    """Keeps at most `most` idle connections per address, none longer than `seconds`; the freshest is used first."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._idle: dict[str, list[tuple[float, EngineStream]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, address: str) -> EngineStream | None:
        """Return an idle connection that the engine has not closed, or None. It may be closing it now all the same."""
        self._expire()
        idle = self._idle.get(address, [])
        while idle:
            _, stream = idle.pop()
            if stream.usable:
                return stream
            stream.abort()
        self._idle.pop(address, None)
        return None

    def put(self, address: str, stream: EngineStream) -> None:
        """Keep a connection that is ready for another request; one too many is dropped."""
        self._expire()
        idle = self._idle.setdefault(address, [])
        if len(idle) >= self._most or not stream.usable:
            stream.abort()
        else:
            idle.append((self._clock(), stream))

    def close(self) -> None:
        """Drop them all."""
        for idle in self._idle.values():
            for _, stream in idle:
                stream.abort()
        self._idle.clear()

    def _expire(self) -> None:
        oldest = self._clock() - self._seconds
        for address, idle in list(self._idle.items()):
            while idle and idle[0][0] < oldest:
                idle.pop(0)[1].abort()
            if not idle:
                del self._idle[address]
