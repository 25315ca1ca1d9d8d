"""A key's fingerprint: short enough for two people to compare, long enough that no other key can be made to fit it.

60 bits of BLAKE2b, personalised, as three groups of four letters: finding another key with the same takes 2^60 tries.
"""

import hashlib

from mesh_llm.core.ids import NodeId

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Base 32 without the letters that look like digits (Crockford's)."""
_GROUPS, _GROUP = 3, 4
LETTERS = _GROUPS * _GROUP
_LOOKS_LIKE = str.maketrans({"o": "0", "i": "1", "l": "1", "-": None, " ": None})


def fingerprint(node: NodeId) -> str:
    """As people read it: `k3td-9m2x-7q0w`."""
    digest = hashlib.blake2b(bytes.fromhex(node), digest_size=8, person=b"mesh-llm finger").digest()
    number = int.from_bytes(digest, "big")
    letters = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(0, 5 * LETTERS, 5))
    return "-".join(letters[start : start + _GROUP] for start in range(0, LETTERS, _GROUP))


def normal(text: str) -> str:
    """What somebody typed of a fingerprint, as its letters alone: case, dashes and look-alikes do not matter."""
    return text[: 4 * LETTERS].strip().lower().translate(_LOOKS_LIKE)
