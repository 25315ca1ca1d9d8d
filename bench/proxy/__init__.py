"""What the front door costs, side by side: nothing in between, mesh-llm, a bare relay, nginx, litellm's proxy."""
