"""The machines to plan for: one profile each, and what it says."""
