"""The one exception of the Nostr library, whose generated class type checkers do not take for one."""

from typing import cast

import nostr_sdk

SdkError = cast("type[Exception]", nostr_sdk.NostrSdkError)
"""Everything that fails in there; its text says why."""


def reason_of(error: Exception) -> str:
    """Why, as a clause; a relay may have written it, so it is bounded and harmless."""
    text = str(error).strip("' ") or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in text[:200])
