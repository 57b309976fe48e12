"""Truly sparse training: layers that store their non-zeros only, and connections that move."""
