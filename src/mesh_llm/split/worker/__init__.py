"""A worker of a split model: sessions of hosts, each with an rpc-server of its own."""
