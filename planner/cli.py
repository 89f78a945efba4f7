"""The command line, the composition root; each command is a file of `planner/commands/`."""

from __future__ import annotations

import sys
from typing import Any

import click

from tokenspeed_plan.planner.commands.bench import bench_command
from tokenspeed_plan.planner.commands.calibrate import calibrate
from tokenspeed_plan.planner.commands.chat import chat
from tokenspeed_plan.planner.commands.check import check
from tokenspeed_plan.planner.commands.plan import plan
from tokenspeed_plan.planner.commands.predict import predict, sweep
from tokenspeed_plan.planner.commands.run import run
from tokenspeed_plan.planner.commands.serve import serve
from tokenspeed_plan.planner.commands.show import diff_command, show
from tokenspeed_plan.planner.commands.sign import sign_command
from tokenspeed_plan.plans.errors import TokenspeedError

FILE_HINT = "check the path, its permissions and the space left"


class _Group(click.Group):
    """Writes errors of ours as `error:` and `hint:` to stderr, and exits with their code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TokenspeedError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(1)
        except OSError as error:
            click.echo(f"error: {_describe(error)}\n\nhint: {FILE_HINT}", err=True)
            ctx.exit(2)


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    if not error.filename:
        return reason
    return f"`{error.filename}`: {reason}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tokenspeed-plan")
def main() -> None:
    """Compile a language model's deployment into a frozen plan, and replay it."""


for command in (
    plan,
    show,
    diff_command,
    check,
    sign_command,
    run,
    chat,
    serve,
    bench_command,
    predict,
    sweep,
    calibrate,
):
    main.add_command(command)
