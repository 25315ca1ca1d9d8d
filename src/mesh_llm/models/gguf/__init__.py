"""GGUF files: headers, and the facts about a model in them."""
