"""Ollama's API, below `/api`: what its clients ask becomes a request to an engine, and the answer becomes Ollama's.

`requests` and `answers` translate, and do nothing else. `replies` lets an engine's answer pass through a translation
while it comes. `catalogue` describes models as Ollama does. `endpoints` binds the paths.

Source of all shapes: docs/api.md and api/types.go of Ollama 0.24 (github.com/ollama/ollama).
"""
