"""The front door as the settings want it, and where it is."""

from mesh_llm.api.config import ApiConfig
from mesh_llm.daemon.settings import Settings


def api_config(settings: Settings) -> ApiConfig:
    """What the front door is told."""
    return ApiConfig(
        host=settings.listen,
        port=settings.api_port,
        keys=settings.api_keys,
        resume_wait=settings.resume_wait,
    )


def api_base(listen: str, port: int) -> str:
    """The API's URL for clients on this machine."""
    host = "127.0.0.1" if listen in {"0.0.0.0", "::", "localhost"} else listen  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
