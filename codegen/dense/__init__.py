"""Embedding, norms and products."""
