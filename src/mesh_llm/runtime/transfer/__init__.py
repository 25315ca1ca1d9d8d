"""Fetches one large file over HTTP or from elsewhere: in blocks, resumed after a kill, with progress, verified."""
