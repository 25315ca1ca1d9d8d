"""mesh-llm: several ordinary machines, one computer for open language models."""

__version__ = "0.2.0"
