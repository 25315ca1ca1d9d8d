"""What tests share: nodes as processes, an HTTP client that can be anywhere, generated models."""
