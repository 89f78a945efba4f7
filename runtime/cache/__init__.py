"""The prefix cache: pages and state checkpoints by content, and what is evicted."""
