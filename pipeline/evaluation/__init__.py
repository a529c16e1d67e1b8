"""Held-out loss and what is derived from it."""
