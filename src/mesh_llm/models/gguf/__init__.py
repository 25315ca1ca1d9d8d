"""GGUF files: headers, and what they say of a model."""
