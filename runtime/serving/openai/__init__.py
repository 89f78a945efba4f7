"""What OpenAI's API says: requests checked, answers written. Batch files and the server share it."""
