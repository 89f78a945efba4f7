"""The machines: one YAML file each, a source beside every number. `planner/advisor/hardware.py` reads them."""
