"""Models on disk: what a file is, what it needs, and the built-in tiny one."""
