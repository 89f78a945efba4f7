"""The command: `python -m tokenspeed_plan` is `tokenspeed`."""

from tokenspeed_plan.planner.cli import main

if __name__ == "__main__":
    main()
