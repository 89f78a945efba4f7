"""Attention: its preparation, decode and prefill."""
