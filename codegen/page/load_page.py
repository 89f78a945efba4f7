"""A simulated load as one HTML page, which fetches nothing; `load.html.j2` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed_plan.codegen.page.templates import page_template
from tokenspeed_plan.plans.schema import Plan


def render_load_page(plan: Plan, figures: Mapping[str, Any], series: Mapping[str, Any]) -> str:
    """The page.

    Args:
        plan: what was simulated.
        figures: of the whole load, as `simulate --json` prints them.
        series: the load over time.
    """
    return page_template("load.html.j2").render(plan=plan, figures=figures, series=series)
