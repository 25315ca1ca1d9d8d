"""Bytes to values and back, sans-IO, bounded: whatever comes from outside goes through here first."""
