"""What runs on a node of `run --ray`: it gets a plan by its digest, and starts a worker's command.

It waits for its start alone, so it loads neither the schema of plans nor the command line: what it
starts does, and checks more.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tokenspeed_plan.planner.commands.rank_processes import child_environment, own_command
from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.plans.errors import PlanError

REFUSED = 2  # the worker refused the plan, the rows or the machine
LOST = 70  # what an actor that cannot run its worker says
_CACHE = "TOKENSPEED_PLANS"  # where a node keeps plans that it was sent
_SHOWN_BYTES = 1 << 14  # of what a worker printed


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A plan as it travels: its digest, where the driver has it, its files; one is the plan's."""

    digest: str
    path: str
    archive: bytes
    plan_file: str


class RayWorker:
    """The actor: runs a worker's command on its node."""

    def work(
        self, args: Sequence[str], number: int, kinds: Sequence[str | None], *sent: SentPlan
    ) -> tuple[int, str]:
        """Run it to its end; returns its exit code, and what it has printed last.

        Args:
            args: of the command, behind the plan.
            number: of its own plan.
            kinds: of node, one for each plan where there are several.
            sent: all plans of the job.
        """
        try:
            bundles = [unpack(each) for each in sent]
        except PlanError as error:
            return REFUSED, str(error)
        except OSError as error:
            return LOST, f"error: cannot keep the plan: {error}\n"
        plans = [f"--plan={kind}={path}" for kind, path in zip(kinds, bundles, strict=False)]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                own_command(["run", str(bundles[number]), *args, *plans]),
                env=os.environ | child_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
            code = process.wait()
            output.seek(max(output.tell() - _SHOWN_BYTES, 0))
            return code, output.read().decode(errors="replace")


def unpack(sent: SentPlan) -> Path:
    """A bundle with the digest of the plan: one that this node has, or the one that was sent.

    Raises:
        PlanError: what was sent is another plan.
    """
    cache = os.environ.get(_CACHE) or os.path.expanduser("~/.cache/tokenspeed-plan")
    kept = Path(cache) / sent.digest
    for folder in (Path(sent.path), kept):
        if _has(folder, sent):
            return folder
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        draft = Path(scratch) / "bundle"
        try:
            with tarfile.open(fileobj=io.BytesIO(sent.archive), encoding="utf-8") as archive:
                archive.extractall(draft, filter="data")
        except tarfile.TarError as error:
            raise PlanError(
                f"the plan that was sent is damaged: {error}", "send it again"
            ) from error
        if not _has(draft, sent):
            raise PlanError("the plan that was sent is not the one that was named", "send it again")
        with suppress(OSError):  # another worker of this node has put it there
            draft.rename(kept)
    return kept


def _has(folder: Path, sent: SentPlan) -> bool:
    """Whether what a folder holds has this digest; whoever runs it checks the plan's rules, too."""
    path = folder / sent.plan_file
    try:
        if not path.is_file():
            return False
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("digest")
        return sha256(canonical(fields)) == sent.digest
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
