"""Drafting the next block inside the current verification."""
