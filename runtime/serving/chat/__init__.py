"""Reads what a model answers in a chat: its thoughts, its text, and its calls of tools."""
