"""The console's place: where it listens, what it demands of those who come from elsewhere, and where to find it."""

from mesh_llm.api.keys import KeyRing
from mesh_llm.console.server import ConsoleServer
from mesh_llm.core.errors import MeshError
from mesh_llm.daemon.settings import Settings
from mesh_llm.runtime.home import Home
from mesh_llm.wire.authority import is_loopback_address

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


def open_console(settings: Settings, home: Home) -> ConsoleServer:
    """Bind the console.

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
    return ConsoleServer(
        settings.console_port,
        home.control_token,
        home.logs,
        page=settings.console_page,
        host=settings.console_listen,
        accepts=None if local else keys.accepts,
    )


def console_host(settings: Settings) -> str:
    """By which address this machine reaches the console."""
    return _EVERYWHERE.get(settings.console_listen, settings.console_listen)


def console_url(settings: Settings, port: int) -> str:
    """For a browser on this machine."""
    host = console_host(settings)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
