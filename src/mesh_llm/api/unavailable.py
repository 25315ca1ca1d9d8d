"""Why a model cannot answer, told so that a user knows what to do and a program when to try again."""

from collections.abc import Sequence

from mesh_llm.api.upstream_error import CONTEXT_EXCEEDED, ContextExceededError
from mesh_llm.core.errors import MeshError
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.naming import Ambiguous, NotFound
from mesh_llm.core.routing import ModelRoute, RoutingSnapshot

_MOST_LISTED = 20
_LOAD_BYTES_PER_SECOND = 5e8
_RETRY_SOON = 2.0


def no_such_model(resolution: Ambiguous | NotFound, snapshot: RoutingSnapshot) -> MeshError:
    """404 for a name that means no model, or several; lists what there is. 503 while nobody can know yet."""
    if snapshot.version == 0:
        message = "This node is starting, and does not know its models yet."
        return MeshError("model_loading", message, "Try again shortly.", 503, _RETRY_SOON, param="model")
    listed = ", ".join(resolution.choices[:_MOST_LISTED])
    if len(resolution.choices) > _MOST_LISTED:
        listed += f" and {len(resolution.choices) - _MOST_LISTED} more"
    if isinstance(resolution, Ambiguous):
        message = f"The name `{resolution.asked}` could mean several models: {listed}."
        return MeshError("ambiguous_model", message, "Give more of the name.", 404, param="model")
    if resolution.asked is None:
        message = "The request names no model, and this node serves none of its own."
    else:
        message = f"The model `{resolution.asked}` does not exist."
    hint = f"There is: {listed}." if listed else "No models are known here yet."
    return MeshError("model_not_found", message, hint, 404, param="model")


def not_served_here(name: str) -> MeshError:
    """404 for another node that asks for a model which this one does not serve."""
    return MeshError("model_not_here", f"This node does not serve `{name}`.", "", 404, param="model")


def not_ready(route: ModelRoute) -> MeshError:
    """503 for a model that is known, with the reason, and with when to try again where that is known."""
    name, reason = route.name, route.reason
    if route.status is ModelStatus.LOADING:
        wait = min(60.0, _RETRY_SOON + route.size_bytes / _LOAD_BYTES_PER_SECOND)
        return MeshError("model_loading", f"The model `{name}` is loading.", "Try again shortly.", 503, wait)
    if route.status is ModelStatus.FAILED:
        message = f"The model `{name}` failed to start: {reason or 'no reason was given'}"
        return MeshError("model_failed", message, "The log of its node says more: mesh-llm logs.", 503)
    if route.status is ModelStatus.STOPPING:
        return MeshError("model_stopping", f"The model `{name}` is being stopped.", "", 503, 10.0)
    message = f"No node serves the model `{name}` at present{f': {reason}' if reason else ''}."
    return MeshError("model_not_served", message, f"Serve it with: mesh-llm load {name}", 503, 30.0)


def all_targets_failed(route: ModelRoute, refusals: Sequence[MeshError]) -> MeshError:
    """What to say when every target that was tried refused or was lost."""
    too_long = [error for error in refusals if isinstance(error, ContextExceededError)]
    if too_long:
        tokens = max(error.prompt_tokens for error in too_long)
        largest = max([error.context for error in too_long] + [target.context for target in route.targets])
        if largest <= tokens or len(too_long) == len(refusals):
            return prompt_too_long(route, tokens, largest)
        refusals = [error for error in refusals if error not in too_long]
    busy = [error for error in refusals if error.status == 429]
    if busy and len(busy) == len(refusals):
        wait = min((error.retry_after for error in busy if error.retry_after), default=_RETRY_SOON)
        message = f"All nodes that serve `{route.name}` are busy."
        return MeshError("overloaded", message, "Try again shortly.", 429, wait)
    message = f"No node that serves `{route.name}` answered."
    wait = min((error.retry_after for error in refusals if error.retry_after), default=_RETRY_SOON)
    return MeshError("model_unavailable", message, "Try again shortly; mesh-llm status shows the nodes.", 503, wait)


def prompt_too_long(route: ModelRoute, tokens: int, largest: int) -> MeshError:
    """400 for a prompt that fits no host of its model; `tokens` 0: not known."""
    message = f"The prompt is {tokens} tokens long" if tokens else "The prompt is too long"
    message += f", and the largest context for `{route.name}` is {largest} tokens."
    hint = "Send less, or serve the model with more: --ctx-size."
    return ContextExceededError(
        CONTEXT_EXCEEDED, message, hint, 400, param="messages", prompt_tokens=tokens, context=largest
    )


def stream_broken(reason: str = "") -> MeshError:
    """What ends a stream whose target was lost in the middle of its answer; `reason`: why nobody goes on with it."""
    message = "The node that was answering was lost in the middle of its answer"
    message += f", and it cannot be continued: {reason}." if reason else "."
    return MeshError("target_lost", message, "Ask again.", 503)


def node_stopping() -> MeshError:
    """503 while the node drains."""
    return MeshError("node_stopping", "This node is stopping.", "Ask another node, or try again later.", 503, 10.0)


def node_busy(wait: float) -> MeshError:
    """429 over the limit of requests in flight; `wait` is when one of them should have ended."""
    return MeshError(
        "too_many_requests", "This node is answering as many requests as it takes.", "Try again shortly.", 429, wait
    )


def engine_busy(wait: float) -> MeshError:
    """429 where too many wait for an engine of this node already; `wait` is when they should have had their turn."""
    return MeshError(
        "engine_busy", "Too many requests wait for this model here already.", "Try again shortly.", 429, wait
    )
