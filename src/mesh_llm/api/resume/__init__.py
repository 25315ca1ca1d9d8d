"""Resumes a streamed answer on another engine when the first one is lost; one state for each dialect."""
