"""How well clients get on: libraries of pinned versions, against the engine alone and against mesh-llm."""
