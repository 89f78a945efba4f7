"""Whether a plan fits this machine and this folder; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan


def check_target(plan: Plan) -> None:
    """Refuse a plan for another machine.

    Raises:
        PlanError: it is for a GPU that is not here, or for several.
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
    if wanted and (plan.target.count > 1 or streams > 1):
        raise PlanError(
            f"the plan is for {plan.target.count} GPUs and {streams} streams, one of each is "
            "replayed today",
            "plan it for one GPU: `target: {count: 1}`",
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

    Raises:
        PlanError: one is missing or was changed.
    """
    for name, digest in plan.model.files.items():
        path = folder / name
        if not path.is_file():
            raise PlanError(f"`{path}` is missing", "name the model folder with `--weights DIR`")
        if sha256(path.read_bytes()) != digest:
            raise PlanError(
                f"`{path}` is not the file that was planned", "plan again, or restore the file"
            )


def find_weights(plan: Plan, bundle: Path, given: Path | None) -> Path:
    """The checkpoint folder.

    It is the given one; else the spec's path, from the current folder or from a folder above the
    bundle.

    Raises:
        PlanError: there is none.
    """
    if given is not None:
        roots: Mapping[Path, Path] = {given: given}
    elif plan.model.location is None:
        raise PlanError(
            f"the plan of `{plan.model.name}` names no checkpoint", "name one with `--weights DIR`"
        )
    else:
        starts = [Path(), *bundle.resolve().parents]
        roots = {start / plan.model.location: start for start in starts}
    found = next((folder for folder in roots if folder.is_dir()), None)
    if found is None:
        raise PlanError(
            f"there is no folder `{next(iter(roots))}`", "name the checkpoint with `--weights DIR`"
        )
    return found
