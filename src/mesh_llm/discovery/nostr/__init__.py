"""Public listings on Nostr relays."""
