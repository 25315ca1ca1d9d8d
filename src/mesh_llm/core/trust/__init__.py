"""Who saw a prompt, and what of that is proved."""
