"""Which deployment: what can be asked for, what each would do, and which is best."""
