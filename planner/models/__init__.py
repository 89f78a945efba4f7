"""The model families: what a config says, what a checkpoint holds, and each graph of operators."""
