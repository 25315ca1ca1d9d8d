"""The calls of the management API, by what they are about. All of them are in `CALLS`."""

from mesh_llm.console.calls import Call
from mesh_llm.console.routes.membership import MEMBERSHIP_CALLS
from mesh_llm.console.routes.models import MODELS_CALLS
from mesh_llm.console.routes.node import NODE_CALLS
from mesh_llm.console.routes.session import SESSION_CALLS

CALLS: tuple[Call, ...] = (*NODE_CALLS, *MODELS_CALLS, *MEMBERSHIP_CALLS, *SESSION_CALLS)
