"""What the API costs, side by side: nothing in between, mesh-llm, a bare relay, nginx, litellm's proxy."""
