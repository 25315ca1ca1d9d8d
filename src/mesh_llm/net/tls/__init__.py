"""TLS 1.3 over TCP between admitted nodes that reach each other directly: a ticket over QUIC opens a connection."""
