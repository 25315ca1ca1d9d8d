"""Who is alive: failure detection, gossip, and what is known of every node."""
