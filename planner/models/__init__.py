"""The model families: what a config says, what a checkpoint holds, and the operator graph of each."""
