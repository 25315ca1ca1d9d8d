"""What stands before an rpc-server: requests, graphs, indices and buffers are checked here."""
