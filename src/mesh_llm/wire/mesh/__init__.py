"""What nodes say to each other: bytes to values and back, bounded and signed."""
