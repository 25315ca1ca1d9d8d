"""What a mesh shows to strangers: the listing, when it is published, and which one to join."""
