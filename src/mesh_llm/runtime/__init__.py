"""What every edge needs of asyncio and the operating system: owned tasks, byte streams, logs, files, locks."""
