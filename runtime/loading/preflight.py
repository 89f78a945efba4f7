"""Whether a plan fits this machine and this folder; checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.tokenizer_files import TOKENIZER_FILES, template_names
from tokenspeed_plan.plans.weight_digests import check_headers


def check_target(plan: Plan) -> None:
    """Refuse a plan for another machine.

    Raises:
        PlanError: it is for a GPU that is not here, or has several streams.
    """
    wanted = plan.target.sm
    here = 0
    if wanted:
        here = compute_capability()
    if wanted != here:
        found = "there is none here"
        if here:
            found = f"this machine's is sm_{here}"
        machine = f"{plan.target.count} x {plan.target.gpu} (sm_{wanted})"
        raise PlanError(
            f"the plan is for {machine}, {found}",
            "plan it again for this machine: `target: {gpu: ...}`",
        )
    streams = max(program.num_streams for program in plan.pool.programs)
    if wanted and streams > 1:
        raise PlanError(
            f"the plan has {streams} streams, one is replayed on a GPU today",
            "plan it again with this version",
        )


def compute_capability() -> int:
    """Compute capability of the current GPU, as 90 for 9.0; 0 where PyTorch finds none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def check_files(plan: Plan, folder: Path) -> None:
    """The files that the plan was made from must be the ones in the folder.

    Of the weights, the headers are compared.

    Raises:
        PlanError: one is missing or was changed, or one that would be read was added.
    """
    for name in (*TOKENIZER_FILES, *template_names(folder)):
        if name not in plan.model.files and (folder / name).is_file():
            raise PlanError(
                f"`{folder / name}` was not there when the model was planned",
                "plan again, or remove the file",
            )
    for name, digest in plan.model.files.items():
        path = folder / name
        if not path.is_file():
            raise PlanError(f"`{path}` is missing", "name the model folder with `--weights DIR`")
        if sha256(path.read_bytes()) != digest:
            raise PlanError(
                f"`{path}` is not the file that was planned", "plan again, or restore the file"
            )
    check_headers(plan, folder)


def find_weights(plan: Plan, bundle: Path, given: Path | None) -> Path:
    """The checkpoint folder.

    It is the given one; else the spec's path, from a folder above the bundle, the nearest first.
    Only where there is none it is looked up from the current folder: what happens to lie there must
    not take the place of the bundle's own model.

    Raises:
        PlanError: there is none, or its files are links to others elsewhere.
    """
    if given is not None:
        given = Path(os.path.expanduser(given))
        roots: Mapping[Path, Path] = {given: given}
    elif plan.model.location is None:
        raise PlanError(
            f"the plan of `{plan.model.name}` names no checkpoint", "name one with `--weights DIR`"
        )
    else:
        starts = [*bundle.resolve().parents, Path()]
        location = os.path.expanduser(plan.model.location)
        roots = {start / location: start for start in starts}
    found = next((folder for folder in roots if folder.is_dir()), None)
    if found is None:
        raise PlanError(
            f"there is no folder `{next(iter(roots))}`", "name the checkpoint with `--weights DIR`"
        )
    if given is None:
        _refuse_links(plan, found)
    return found


def _refuse_links(plan: Plan, folder: Path) -> None:
    """The files of a folder that nobody named must lie in it, or in the hub's cache around it."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent  # models--ORG--NAME, where the snapshot's links lead
    for name in plan.model.files:
        target = (folder / name).resolve()
        if not target.is_relative_to(root):
            raise PlanError(
                f"`{folder / name}` is a link to `{target}`, outside the model's folder",
                f"where that is right, name the folder: `--weights {folder}`",
            )
