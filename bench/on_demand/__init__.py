"""Models on demand: what a cold request costs beside the engine's load, many swaps, and a simulated mesh."""
