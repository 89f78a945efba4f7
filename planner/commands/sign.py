"""`tokenspeed sign`: say who answers for a bundle; and the options of commands that ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tokenspeed_plan.plans.bundle import (
    CUBIN,
    check_cubins,
    check_sources,
    dump_plan,
    load_plan,
    write_signature,
)
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.signature import Signers, sign

Folder = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


@click.command("sign")
@click.argument("bundle", type=Folder)
@click.option("--key", type=Folder, required=True, help="A private key of OpenSSH.")
def sign_command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE with a key of OpenSSH; `--require-signature` asks for it."""
    frozen = load_plan(bundle)
    check_sources(frozen, bundle)
    if (bundle / CUBIN).is_dir():
        check_cubins(frozen, bundle)
    path = write_signature(bundle, sign(dump_plan(frozen).encode(), key))
    click.echo(f"wrote {path}, for the plan {frozen.digest[:16]}", err=True)


def signature_options(command: Command) -> Command:
    """Add the options `--require-signature` and `--signer`."""
    command = click.option(
        "--signer", metavar="ID", help="Only this one of the allowed signers counts."
    )(command)
    return click.option(
        "--require-signature",
        "allowed_signers",
        type=Folder,
        metavar="FILE",
        help="Refuse a plan that no one signed whom FILE allows (see ssh-keygen(1)).",
    )(command)


def wanted_signers(allowed: Path | None, signer: str | None) -> Signers | None:
    """Whose signatures the options ask for; None where they ask for none.

    Raises:
        RequestError: there is a signer, but no file with the key.
    """
    if allowed is not None:
        return Signers(allowed, signer)
    if signer is not None:
        raise RequestError(
            f"`--signer {signer}` needs a file with the key", "add `--require-signature FILE`"
        )
    return None
