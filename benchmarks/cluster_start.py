"""How long a worker takes from its command to its first row, in parts.

    python benchmarks/cluster_start.py alone BUNDLE [--times 5]
    python benchmarks/cluster_start.py ray BUNDLE [--times 5]

`alone` is a worker by leases. `ray` is `run --ray` on a cluster that is up, from the driver's
command through the actor to the worker that the actor starts; it says first how long the cluster
took to come up. Events are seen from inside of each process by an audit hook: when it began,
imported a module, opened or made a file. Four rows, files in memory, one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import lease_args, local_cluster, start, write_rows

# Loaded by each process at its start. Writes `SECONDS PROCESS EVENT` to a file; the first of each
# kind of process counts.
HOOK = """
import os, sys, time
NAMES = {
    "tokenspeed_plan.planner.cli": "loads the command line",
    "tokenspeed_plan.planner.commands.ray_driver": "loads the driver's module",
    "ray": "loads Ray",
    "ray.util.placement_group": "has joined the cluster and sent the plan",
    "torch": "loads PyTorch",
    "tokenspeed_plan.runtime.tokenizer": "loads the runtime",
    "tokenspeed_plan.runtime.serving.leases.lease_worker": "loads what shares a batch",
    "tokenspeed_plan.runtime.engine": "loads the engine's modules",
    "tokenspeed_plan.runtime.canary": "has loaded the engine",
}
ENDS = {
    "plan.json": "reads the plan",
    "tokenizer.json": "reads the tokenizer",
    ".safetensors": "reads the weights",
}
MADE = {
    "leases/index.1": "has the lease of the index",
    "done/index.json": "has made the index",
    "leases/00000.1": "has the first shard",
    "done/00000.json": "has answered all rows of the first shard",
}
command = open("/proc/self/cmdline").read().replace(chr(0), " ")
PROCESS = (
    "actor" if "default_worker.py" in command
    else "worker" if "--leave-last" in command or "--ray" not in command
    else "driver"
)
if "planner.cli" in command or PROCESS == "actor":
    seen = set()
    log = os.open(os.environ["START_EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(event, at_s=None):
        if event not in seen:
            seen.add(event)
            os.write(log, f"{at_s or time.time():.4f} {os.getpid()} {PROCESS} {event}\\n".encode())

    def hook(event, args):
        if event == "import" and args[0] in NAMES:
            note(NAMES[args[0]])
        elif event == "open":
            name = str(args[0])
            for end, what in ENDS.items():
                if name.endswith(end):
                    note(what)
        elif event == "os.link":
            for end, what in MADE.items():
                if str(args[1]).endswith(end):
                    note(what)
        elif event == "os.rename" and str(args[1]).endswith("out.jsonl"):
            note("has merged")
        elif event == "subprocess.Popen" and PROCESS == "actor":
            note("starts the worker")

    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    note("begins", time.time() - ago_s)
    sys.addaudithook(hook)
"""
Event = tuple[str, str]  # kind of process, what it does


@contextmanager
def watched_processes() -> Iterator[Path]:
    """Processes that begin in the body write their events to a file."""
    before = os.environ.get("PYTHONPATH", "")
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        (Path(folder) / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        events = Path(folder) / "events"
        paths = filter(None, (folder, str(Path(__file__).resolve().parents[1]), before))
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "START_EVENTS": str(events)}
        try:
            yield events
        finally:
            os.environ["PYTHONPATH"] = before


@contextmanager
def one_node(cpus: int) -> Iterator[str]:
    """The address of a cluster of one node with so many CPUs."""
    cluster = local_cluster(cpus)
    import ray

    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def events_of(path: Path) -> dict[Event, float]:
    """When each event came first, in seconds since the first one of all; of whom got a shard."""
    lines = [line.split(" ", 3) for line in path.read_text(encoding="utf-8").splitlines()]
    begun_s = min(float(at_s) for at_s, *_ in lines)
    busy = {number for _, number, kind, event in lines if "shard" in event or kind != "worker"}
    # Ray starts processes ahead: an actor's is the one that starts a worker.
    busy -= {
        number
        for _, number, kind, _ in lines
        if kind == "actor"
        and not any(other == number and "starts" in event for _, other, _, event in lines)
    }
    found: dict[Event, float] = {}
    for at_s, number, kind, event in lines:
        if number in busy:
            found.setdefault((kind, event), float(at_s) - begun_s)
    return found


def one_start(args: argparse.Namespace, folder: Path, events: Path, ray: Sequence[Any]) -> Any:
    """The events of one job; and when its driver or worker had ended."""
    write_rows(folder / "in.jsonl", 4)
    events.unlink(missing_ok=True)
    words = [*lease_args(args.bundle.resolve(), folder, 1), *ray]
    words.remove("--no-canary")
    begin_s = time.time()
    process = start(words, folder / "log", OMP_NUM_THREADS="1")
    assert process.wait() == 0, (folder / "log").read_text(encoding="utf-8")
    whole_s = time.time() - begin_s
    found = events_of(events)
    return found | {(next(iter(found))[0], "has ended"): whole_s}


def show(every: Sequence[dict[Event, float]]) -> None:
    """Medians of when events came, in their order, and what lies between two."""
    medians = {
        event: statistics.median(found[event] for found in every if event in found)
        for event in every[0]
    }
    before = 0.0
    print("   after   took  (seconds, medians; what the line before took)")
    for (kind, event), at_s in sorted(medians.items(), key=lambda pair: pair[1]):
        print(f"{at_s:8.2f} {at_s - before:6.2f}  {kind}: {event}")
        before = at_s


def run_alone(args: argparse.Namespace) -> int:
    with watched_processes() as events:
        show([in_scratch(args, events, ()) for _ in range(args.times)])
    return 0


def in_scratch(args: argparse.Namespace, events: Path, ray: Sequence[Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        return one_start(args, Path(scratch), events, ray)


def run_ray(args: argparse.Namespace) -> int:
    with watched_processes() as events, one_node(1) as address:
        show([in_scratch(args, events, ("--ray", address)) for _ in range(args.times)])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    for name, run in (("alone", run_alone), ("ray", run_ray)):
        mode = modes.add_parser(name)
        mode.set_defaults(run=run)
        mode.add_argument("bundle", type=Path)
        mode.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
