"""Who asks the engine: batch files, HTTP, and what both take from OpenAI's API."""
