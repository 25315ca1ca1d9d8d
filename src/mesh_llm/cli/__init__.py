"""The command line: thin, quick to start, and says what to do next."""
