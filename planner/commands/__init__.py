"""The commands, a file each; with `planner/cli.py` the only place where planner, codegen and runtime meet."""
