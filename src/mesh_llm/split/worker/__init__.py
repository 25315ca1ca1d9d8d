"""A worker of a split model: sessions of hosts, each with an RPC server of its own."""
