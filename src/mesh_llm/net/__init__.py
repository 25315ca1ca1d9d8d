"""QUIC between nodes (iroh): endpoint, connections, admission, typed streams."""
