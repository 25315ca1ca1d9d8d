"""Finding meshes: on Nostr relays, and on the local network."""
