"""The command line, the composition root; each command is a file of `planner/commands/`."""

from __future__ import annotations

import io
import shutil
import sys
from collections import UserDict
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.commands.engines import ARGS
from tokenspeed_plan.planner.commands.process import set_up_process
from tokenspeed_plan.planner.commands.rank_processes import end_with_parent
from tokenspeed_plan.plans.errors import TokenspeedError
from tokenspeed_plan.plans.text import printable_line

FILE_HINT = "check the path, its permissions and the space left"
# The module of each command in `planner/commands/`, and its name there.
_PLACES = {
    "bench": ("bench", "bench_command"),
    "calibrate": ("calibrate", "calibrate"),
    "chat": ("chat", "chat"),
    "check": ("check", "check"),
    "diff": ("show", "diff_command"),
    "lengths": ("lengths", "lengths_command"),
    "measure-routing": ("measure_routing", "measure_routing_command"),
    "plan": ("plan", "plan"),
    "predict": ("predict", "predict"),
    "quantize": ("quantize", "quantize"),
    "run": ("run", "run"),
    "serve": ("serve", "serve"),
    "show": ("show", "show"),
    "sign": ("sign", "sign_command"),
    "simulate": ("simulate_load", "simulate_command"),
    "spec": ("spec_command", "spec_command"),
    "sweep": ("predict", "sweep"),
}


class _Commands(UserDict[str, click.Command]):
    """The commands by their names; each is imported when it is asked for.

    A worker that replays a plan would wait longer for the modules of the planner than for its own.
    """

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(_PLACES, click.Command(None)))

    def __getitem__(self, name: str) -> click.Command:
        module, attribute = _PLACES[name]
        found = getattr(import_module(f"tokenspeed_plan.planner.commands.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found


class _Group(click.Group):
    """Writes errors of ours as `error:` and `hint:` to stderr, and exits with their code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGS] = tuple(args)  # other ranks are started with them
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        _escape_what_a_terminal_cannot_show()
        try:
            return super().invoke(ctx)
        except TokenspeedError as error:
            click.echo(_as_called(str(error)), err=True)
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


def _as_called(text: str) -> str:
    """The text with commands as this one was called: `.venv/bin/tokenspeed` is not on the path."""
    called = Path(sys.argv[0])
    if called.name != "tokenspeed" or shutil.which("tokenspeed"):
        return text
    return text.replace("`tokenspeed ", f"`{called} ")


def _escape_what_a_terminal_cannot_show() -> None:
    """Write an escape for a character that the locale's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    if not error.filename:
        return reason
    return printable_line(f"`{error.filename}`: {reason}")


@click.group(
    cls=_Group, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="tokenspeed-plan")
def main() -> None:
    """Compile a language model's deployment into a frozen plan, and replay it."""
    set_up_process()
    end_with_parent()


if __name__ == "__main__":
    main()
