"""Names of things. Distinct types, so that one cannot be passed for another."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""A node's Ed25519 public key, 64 lower-case hex digits."""

MeshId = NewType("MeshId", str)
"""A mesh's Ed25519 public key, 64 lower-case hex digits."""

ModelName = NewType("ModelName", str)
"""The name by which a model is served and asked for, as in a request's `model`."""

Term = NewType("Term", int)
"""Counts the launches of one model on one node; an event that carries an old term is about a past life."""

Incarnation = NewType("Incarnation", int)
"""A node's life number: raised when it restarts and when it hears of its own death."""
