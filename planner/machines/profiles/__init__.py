"""Machines, one YAML file each, which `planner/machines/hardware.py` reads."""
