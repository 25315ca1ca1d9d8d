"""The OpenAI-compatible HTTP API: routes a request by its model, and relays the answer byte for byte."""
