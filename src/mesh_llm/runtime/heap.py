"""The garbage collector's part in latency: what start-up made stays for good, and need not be looked at again."""

import gc


def settle() -> None:
    """Collect once, then leave all that is there out of later collections (`gc.freeze`).

    To be called when everything has been imported and built. A full collection over the modules of a daemon takes some
    tens of milliseconds, in which no token moves.
    """
    gc.collect()
    gc.freeze()
