"""What start-up made is left out of later collections; what comes after it is still collected."""

import gc
import weakref

from mesh_llm.runtime.process import freeze_heap


class Knot:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_frozen_and_later_garbage_is_not() -> None:
    freeze_heap()
    try:
        assert gc.get_freeze_count() > 1000
        later = weakref.ref(Knot())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
