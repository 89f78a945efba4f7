"""`tokenspeed spec`: the reference of the spec."""

from __future__ import annotations

import json

import click

from tokenspeed_plan.planner.spec_reference import as_markdown, explain, json_schema


@click.command("spec")
@click.option("--schema", is_flag=True, help="The JSON schema of a spec, for editors.")
@click.option("--explain", "key", metavar="KEY", help="One key, such as workload.turns.")
def spec_command(schema: bool, key: str | None) -> None:
    """Print the reference of the spec: each key with its meaning, unit, default and an example."""
    if schema and key is not None:
        raise click.UsageError("give --schema or --explain, not both")
    if schema:
        click.echo(json.dumps(json_schema(), indent=1, allow_nan=False))
    elif key is not None:
        click.echo(explain(key))
    else:
        click.echo(as_markdown(), nl=False)
