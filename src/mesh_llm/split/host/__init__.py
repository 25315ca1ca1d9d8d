"""The host of a split model: local sockets that stand for the workers' rpc-servers."""
