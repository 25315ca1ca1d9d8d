"""Fetches models from the Hugging Face hub."""
