"""Drafts: made, verified, accepted."""
