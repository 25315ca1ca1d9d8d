"""Models: GGUF files, the hub, this machine's library, transfer between nodes, and cached tensors."""
