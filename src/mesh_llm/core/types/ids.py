"""Ids and names, as distinct types, so that one cannot be passed for another."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""A node's Ed25519 public key, 64 lower-case hex digits."""

MeshId = NewType("MeshId", str)
"""A mesh's Ed25519 public key, 64 lower-case hex digits."""

OwnerId = NewType("OwnerId", str)
"""An owner's Ed25519 public key, 64 lower-case hex digits: a person who has nodes."""

ModelName = NewType("ModelName", str)
"""The name by which a model is served and asked for, as in a request's `model`."""

Term = NewType("Term", int)
"""Counts the launches of one model on one node. An event with an old term is about an earlier launch."""

Incarnation = NewType("Incarnation", int)
"""A node's life number (SWIM): it rises when the node restarts, and when it refutes a suspicion or its own death."""
