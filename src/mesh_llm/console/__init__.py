"""The management API on :3131, and its page."""
