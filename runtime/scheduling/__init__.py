"""Which sequences run in the next step, and which pages and state slots they hold."""
