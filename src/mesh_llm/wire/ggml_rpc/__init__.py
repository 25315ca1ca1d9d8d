"""ggml RPC: its messages, graphs and tensors, what the tunnel adds, and the rules for what may be computed."""
