"""Authenticated messages between machines, which know nothing of training."""
