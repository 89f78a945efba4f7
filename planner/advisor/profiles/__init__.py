"""Machines, one YAML file each, which `planner/advisor/hardware.py` reads."""
