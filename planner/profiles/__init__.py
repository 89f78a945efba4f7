"""The machines: one YAML file each, a source beside every number. `planner/hardware.py` reads them."""
