"""`tokenspeed serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.commands.engines import load_chat_template, on_all_ranks, ready_engine
from tokenspeed_plan.plans.errors import RequestError

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=Folder)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="TOKENSPEED_API_KEY",
    show_envvar=True,
    help="What clients of /v1 must send.",
)
@click.option("--model-name", help="What clients call the model (default: the plan's name for it).")
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Choices in flight; more get 429.",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    default=8 << 20,
    show_default=True,
    help="Largest request body; more gets 413.",
)
@click.option(
    "--body-timeout",
    "body_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds within which a body must come; later gets 408.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that SIGTERM leaves to answers in flight.",
)
@click.option("--weights", type=Folder, help="Checkpoint folder, where it is not the spec's.")
@click.option(
    "--backend", type=click.Choice(["reference", "kernels"]), help="As in `tokenspeed run`."
)
@click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first.")
def serve(bundle: Path, **options: Any) -> None:
    """Serve BUNDLE to OpenAI's clients."""
    _check_packages()
    if options["api_key"] == "":
        raise RequestError("the API key is empty", "give one, or no `--api-key` at all")
    on_all_ranks(
        bundle, options, lambda: _serve(bundle, options), ignored=(signal.SIGTERM, signal.SIGINT)
    )


def _check_packages() -> None:
    missing = [
        name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None
    ]
    if missing:
        raise RequestError(
            f"serving needs {', '.join(missing)}",
            "install the extra `serve`: `pip install 'tokenspeed-plan[serve]'`",
        )


def _serve(bundle: Path, options: dict[str, Any]) -> None:
    from tokenspeed_plan.runtime.serving.http import ServerOptions, listen, serve

    names = ("api_key", "model_name", "max_requests", "max_body_bytes", "body_timeout_s", "drain_s")
    chosen = ServerOptions(**{name: options[name] for name in names})
    with listen(options["host"], options["port"]) as place:
        engine = ready_engine(bundle, options, load_chat_template(bundle, options))
        host, port = place.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        serve(
            engine, chosen, place, lambda: click.echo(f"ready at http://{name}:{port}/v1", err=True)
        )
