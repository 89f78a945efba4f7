"""The next token, and the inputs of the next step."""
