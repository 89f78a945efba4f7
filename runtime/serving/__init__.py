"""Serving: batch files, HTTP, and the parts of OpenAI's API that both share."""
