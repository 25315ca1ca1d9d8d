"""The one family of errors that a user can meet: what happened, and what to do next."""

from dataclasses import dataclass


@dataclass(eq=False)
class MeshError(Exception):
    """An expected failure at an edge, told to a user.

    Attributes:
        code: stable machine-readable name, such as `model_not_found`.
        message: what happened, one or two sentences.
        hint: what to do next; may be empty where nothing can be done.
        status: the HTTP status that says the same.
        retry_after: seconds after which trying again makes sense; None where it does not.
        param: the request field at fault, as in OpenAI's error shape.
    """

    code: str
    message: str
    hint: str = ""
    status: int = 500
    retry_after: float | None = None
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()
