"""Records the RPC traffic of every architecture of the pinned engine: `make rpc-corpus`."""
