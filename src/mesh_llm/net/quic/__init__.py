"""QUIC through iroh: endpoint, connections, streams."""
