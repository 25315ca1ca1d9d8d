"""Resumes a streamed answer at another engine when the first one is lost."""
