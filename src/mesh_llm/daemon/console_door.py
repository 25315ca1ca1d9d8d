"""The console as the settings want it: where it listens, and what it demands of those who come from elsewhere."""

from mesh_llm.api.keys import KeyRing
from mesh_llm.console.server import ConsoleConfig, ConsoleServer
from mesh_llm.console.sessions import Sessions
from mesh_llm.core.errors import MeshError
from mesh_llm.daemon.settings import Settings
from mesh_llm.runtime.home import Home
from mesh_llm.wire.authority import is_loopback_address


def open_console(settings: Settings, home: Home, sessions: Sessions | None = None) -> ConsoleServer:
    """Bind the console. `sessions`: of browsers, which go on over a move to another mesh.

    Raises:
        MeshError: `api_key_required` where others could reach it and no key is set; `port_in_use`, `cannot_listen`.
    """
    keys = KeyRing(settings.api_keys)
    local = is_loopback_address(settings.console_listen)
    if not local and not keys:
        raise MeshError(
            code="api_key_required",
            message=f"--console-listen {settings.console_listen} opens the console to other machines: it needs a key.",
            hint="Add --api-key-file FILE, or set MESH_LLM_API_KEY; make a key with: openssl rand -hex 24",
            status=400,
        )
    config = ConsoleConfig(
        host=settings.console_listen,
        port=settings.console_port,
        page=settings.console_page,
        origins=settings.console_origins,
    )
    return ConsoleServer(config, home, sessions, None if local else keys.accepts)
