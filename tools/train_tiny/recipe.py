"""The two models: their shapes, how they are trained, and what their files say of them."""

from __future__ import annotations

from tools.train_tiny.llama import Shape
from tools.train_tiny.loop import Phase, Schedule

SEED = 20261

TINY_DESCRIPTION = (
    "A very small language model, trained from nothing by the mesh-llm project on text that the project generates "
    "itself. It greets, counts, tells one story, and answers simple questions about itself and mesh-llm, in English. "
    "It is there for trials and tests, and knows little else."
)
DRAFT_DESCRIPTION = (
    "The draft of tiny, for speculative decoding: the same vocabulary, and guesses at what tiny says next."
)


def tiny_shape(vocabulary: int) -> Shape:
    """`tiny`: 4 million weights."""
    return Shape(vocabulary, width=256, layers=5, heads=4, key_value_heads=2, feed_forward=512)


def draft_shape(vocabulary: int) -> Shape:
    """Its draft: a quarter of the weights, and a seventh of the work in its layers."""
    return Shape(vocabulary, width=128, layers=2, heads=4, key_value_heads=2, feed_forward=384)


# Many small steps over short windows first: with so little text, steps are what is short. Then windows that hold the
# longest answers whole, and last a few that are as long as a long conversation.
TINY_SCHEDULE = Schedule(
    (Phase(640, 256, 6), Phase(240, 640, 3), Phase(45, 3072, 1, long=True)), matrix_rate=0.02, other_rate=0.006
)
# First the corpus, then what `tiny` makes of it.
DRAFT_SCHEDULE = Schedule((Phase(500, 256, 8),), matrix_rate=0.02, other_rate=0.006, decay=0.3)
DISTILLATION_SCHEDULE = Schedule((Phase(220, 512, 4),), matrix_rate=0.01, other_rate=0.003, decay=1.0)
