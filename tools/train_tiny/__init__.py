"""Trains `tiny`, the model that is built into mesh-llm, and its draft, from text that this package generates itself."""
