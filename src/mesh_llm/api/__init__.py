"""The front door on :9337: OpenAI-compatible, routed by the request's model, relayed byte for byte."""
