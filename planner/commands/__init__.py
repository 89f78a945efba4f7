"""The commands, one file each. Only these and `planner/cli.py` import from every room."""
