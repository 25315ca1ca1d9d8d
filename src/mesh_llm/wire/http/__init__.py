"""HTTP and the content of API requests: bytes to values, bounded."""
