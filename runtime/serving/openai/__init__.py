"""OpenAI's API as batch files and the HTTP server share it: bodies, conversion, answers."""
