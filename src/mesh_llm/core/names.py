"""How to call a node in a sentence for people."""

from mesh_llm.core.view import Fact


def display_name(fact: Fact) -> str:
    """Its human name and the beginning of its id, or the latter alone."""
    word = fact.announcement
    return f"{word.name} ({word.node[:10]})" if word.name else word.node[:10]
