"""More than one machine, on this one: workers that are killed, lost nodes, a router.

    python benchmarks/cluster.py leases BUNDLE [--rows 2000] [--workers 4] [--kills 100]
    python benchmarks/cluster.py ray BUNDLE [--rows 2000] [--nodes 4] [--kills 20] [--drivers 3]
        [--folder DIR --seconds 800]
    python benchmarks/cluster.py mixed BUNDLE OTHER [--rows 2000]
    python benchmarks/cluster.py serve BUNDLE [--replicas 4]
    python benchmarks/cluster.py router MODEL [--agents 64] [--turns 12] [--replicas 4]

`leases` and `ray` compare the output with that of a single run, byte for byte; one worker's clock
is an hour off. `mixed` has two kinds of nodes with a plan for each. `serve` has replicas on the
nodes of a local cluster of Ray, under load. `router`
compares the cached tokens of conversations with those of one engine that has the same cache as all
replicas. The exit code is 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = "from tokenspeed_plan.planner.cli import main; main()"
# A process whose clock is an hour off, as far as Python asks it.
OFF = "import time; now = time.time; time.time = lambda: now() + 3600; "
TIMEOUT_S = 3.0  # of a lease
TEXTS = ("def f(x):\n", "import os\n", "class A:\n", "for i in range(10):\n")


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = rng.choice(TEXTS) + f"# {number}"
            body = {"prompt": prompt, "max_tokens": rng.choice((1, 2, 4)), "temperature": 0}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")


def start(
    args: Sequence[object], log: Path | None = None, off: bool = False, **env: str
) -> subprocess.Popen[bytes]:
    code = OFF * off + COMMAND
    words = [sys.executable, "-P", "-c", code, *map(str, args)]
    with (log or Path(os.devnull)).open("ab") as file:
        return subprocess.Popen(words, stderr=file, stdout=file, env=os.environ | env)


class SingleRun:
    """A run that nobody disturbs, beside the others."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.output = folder / "single.jsonl"
        self.log = folder / "single.log"
        self.begin_s = time.monotonic()
        args = ["run", bundle, "--input", folder / "in.jsonl", "--output", self.output]
        self.process = start([*args, "--no-canary"], self.log)

    def wait(self) -> bytes:
        assert self.process.wait() == 0, self.log.read_text(encoding="utf-8")
        print(f"a single run beside it took {time.monotonic() - self.begin_s:.1f} s", flush=True)
        return self.output.read_bytes()


def compare(wanted: bytes, found: bytes) -> int:
    """Say whether the outputs are alike; 1 where they are not."""
    if wanted == found:
        print(f"the output is that of a single run, all {len(wanted)} bytes")
        return 0
    names = [
        [json.loads(line)["custom_id"] for line in text.splitlines()] for text in (wanted, found)
    ]
    pairs = zip(wanted.splitlines(), found.splitlines(), strict=False)
    number, lines = next((pair for pair in enumerate(pairs) if len(set(pair[1])) > 1), (-1, ()))
    print(
        f"the outputs differ: {len(names[0])} and {len(names[1])} rows, ids alike: "
        f"{names[0] == names[1]}; first at row {number}: {lines}"
    )
    return 1


def lease_args(bundle: Path, folder: Path, shards: int) -> list[object]:
    return [
        "run", bundle, "--input", folder / "in.jsonl", "--output", folder / "out.jsonl",
        "--lease", folder / "job", "--shards", shards, "--lease-timeout", TIMEOUT_S, "--no-canary",
    ]  # fmt: skip


def local_cluster(cpus: int, nodes: int = 1) -> Any:
    """A cluster of Ray on this machine, which may be busy: nodes with so many CPUs each."""
    from tokenspeed_plan.planner.commands.ray_cluster import be_patient

    be_patient()
    from ray.cluster_utils import Cluster

    begin_s = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "wait": False})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=cpus, wait=False)
    cluster.wait_for_nodes(timeout=300)
    print(f"{nodes} nodes of Ray were up after {time.monotonic() - begin_s:.1f} s", flush=True)
    return cluster


def run_leases(args: argparse.Namespace) -> int:
    """Workers are killed one after the other, at random."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        folder = Path(scratch)
        write_rows(folder / "in.jsonl", args.rows)
        single = SingleRun(args.bundle, folder)
        command = lease_args(args.bundle, folder, args.shards)
        output, log = folder / "out.jsonl", folder / "log"
        workers = [start(command, log, off=number == 0) for number in range(args.workers)]
        kills, begin_s = 0, time.monotonic()
        while any(worker.poll() is None for worker in workers):
            time.sleep(args.pause * 2 * rng.random())
            number = rng.randrange(len(workers))
            if kills < args.kills and not output.exists():
                workers[number].kill()
                workers[number].wait()
                kills += 1
                workers[number] = start(command, log, off=number == 0)
        newest = max(int(name.rpartition(".")[2]) for name in os.listdir(folder / "job/leases"))
        print(
            f"{args.rows} rows, {args.shards} shards, {args.workers} workers, {kills} kills: "
            f"{time.monotonic() - begin_s:.1f} s, a shard had up to {newest} workers"
        )
        codes = [worker.wait() for worker in workers]
        if set(codes) != {0}:
            print(f"exit codes {codes}: {log.read_text(encoding='utf-8')[-2000:]}")
            return 1
        return compare(single.wait(), output.read_bytes())


def run_ray(args: argparse.Namespace) -> int:
    """Workers, drivers and nodes of a local cluster are killed."""
    with kept_folder(args.folder) as folder:
        if not (folder / "in.jsonl").exists():
            write_rows(folder / "in.jsonl", args.rows)
        cluster = local_cluster(1, args.nodes)
        import ray

        single = SingleRun(args.bundle, folder)
        chaos = Chaos(args, cluster, folder)
        is_done = chaos.run(time.monotonic() + args.seconds)
        ray.shutdown()
        cluster.shutdown()
        if not is_done:
            single.process.terminate()
            single.process.wait()
            return 3
        return compare(single.wait(), (folder / "out.jsonl").read_bytes())


@contextmanager
def kept_folder(named: Path | None) -> Iterator[Path]:
    """A folder that is kept where it is named."""
    if named is not None:
        named.mkdir(exist_ok=True)
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        yield Path(scratch)


class Chaos:
    """A job on a local cluster of Ray whose workers, drivers and nodes end at random."""

    def __init__(self, args: argparse.Namespace, cluster: Any, folder: Path) -> None:
        self._args = args
        self._cluster = cluster
        self._folder = folder
        self._rng = random.Random(args.seed)
        self._nodes = cluster.list_all_nodes()[1:]
        shared = lease_args(args.bundle, folder, args.shards)
        self._command = [*shared, "--ray", cluster.address]
        self._kept = folder / "counts.json"
        self.counts = {"workers": 0, "drivers": 0, "nodes": 0}
        if self._kept.exists():
            self.counts = json.loads(self._kept.read_text(encoding="utf-8"))
        self._driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        plans = str(self._folder / "plans")
        return start(self._command, self._folder / "log", TOKENSPEED_PLANS=plans)

    def run(self, until_s: float) -> bool:
        """False where the time is over; the driver is killed then, and goes on in another call."""
        while not (self._folder / "out.jsonl").exists():
            if time.monotonic() > until_s:
                self._kill_driver()
                self._report("time is over")
                return False
            time.sleep(self._args.pause * 2 * self._rng.random())
            assert self._driver.poll() in (None, 0), self._log()
            self._do_harm()
        code = self._driver.wait()
        self._report(f"exit code {code}")
        assert code == 0
        return True

    def _do_harm(self) -> None:
        args, counts = self._args, self.counts
        if counts["drivers"] < min(args.drivers, args.drivers * counts["workers"] / args.kills):
            self._kill_driver()
            self._driver = self._start()
        elif counts["nodes"] < 1 and self._nodes and counts["workers"] > args.kills / 2:
            self._cluster.remove_node(self._nodes.pop())
            self._nodes.append(self._cluster.add_node(num_cpus=1))
            counts["nodes"] += 1
        elif counts["workers"] < args.kills:
            counts["workers"] += kill_a_worker(self._rng, self._folder / "job")
        self._kept.write_text(json.dumps(counts, allow_nan=False), encoding="utf-8")

    def _kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()
        self.counts["drivers"] += 1
        self._kept.write_text(json.dumps(self.counts, allow_nan=False), encoding="utf-8")

    def _log(self) -> str:
        return (self._folder / "log").read_text(encoding="utf-8")[-300:]

    def _report(self, end: str) -> None:
        counts = self.counts
        print(
            f"{self._args.nodes} nodes: {counts['workers']} workers and {counts['drivers']} "
            f"drivers were killed, {counts['nodes']} node was replaced; {end}\n{self._log()}",
            flush=True,
        )


def run_mixed(args: argparse.Namespace) -> int:
    """Two kinds of nodes, each with a plan of its own: each shard is as that plan answers it."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        folder = Path(scratch)
        write_rows(folder / "in.jsonl", args.rows)
        kinds = {"first": args.bundle, "second": args.other}
        alone = {}
        for kind, bundle in kinds.items():
            (folder / kind).mkdir()
            (folder / kind / "in.jsonl").symlink_to(folder / "in.jsonl")
            alone[kind] = SingleRun(bundle, folder / kind).wait().splitlines()
        cluster = local_cluster(0)
        import ray

        for kind in kinds:
            cluster.add_node(num_cpus=1, resources={kind: 1})
        command = lease_args(args.bundle, folder, args.shards)
        command.remove(args.bundle)
        for kind, bundle in kinds.items():
            command += ["--plan", f"{kind}={bundle}"]
        code = start([*command, "--ray", cluster.address], folder / "log").wait()
        ray.shutdown()
        cluster.shutdown()
        print((folder / "log").read_text(encoding="utf-8")[-400:])
        assert code == 0
        lines = (folder / "out.jsonl").read_bytes().splitlines()
        by = {kind: sum(map(bytes.__eq__, lines, found)) for kind, found in alone.items()}
        print(f"{args.rows} rows: {by} as the plan of each kind answers them")
        return int(len(lines) != args.rows or sum(by.values()) != args.rows or 0 in by.values())


@contextmanager
def server(bundle: Path, folder: Path, *options: object) -> Iterator[Any]:
    """A client of a running `tokenspeed serve`."""
    import httpx

    log = folder / f"{bundle.name}-{len(options)}-{time.monotonic_ns()}.log"
    process = start(["serve", bundle, "--port", 0, "--no-canary", *options], log)
    try:
        until = time.monotonic() + 120
        while not (
            found := re.search(r"^ready at (http://\S+)/v1", log.read_text(encoding="utf-8"), re.M)
        ):
            assert process.poll() is None and time.monotonic() < until, log.read_text(
                encoding="utf-8"
            )
            time.sleep(0.1)
        with httpx.Client(base_url=found[1], timeout=300) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def metric(client: Any, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))


class Talkers:
    """Clients that stream one answer after the other, each with a session of its own."""

    def __init__(self, client: Any, count: int) -> None:
        self.whole = self.lost = 0
        self.wrong: list[str] = []
        self._client = client
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _talk(self, number: int) -> None:
        body = {"prompt": f"def f{number}(", "max_tokens": 24, "stream": True, "user": f"u{number}"}
        while not self._is_over.is_set():
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                text = response.read().decode()
            if text.endswith("data: [DONE]\n\n"):
                self.whole += 1
            elif "replica_lost" in text or "no_replica" in text:
                self.lost += 1
            else:
                self.wrong.append(f"{response.status_code}: {text[-300:]}")

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def run_serve(args: argparse.Namespace) -> int:
    """Replicas on nodes of a local cluster: one is killed, a node is replaced, all restart."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        folder = Path(scratch)
        cluster = local_cluster(1, args.replicas)
        import ray

        nodes = cluster.list_all_nodes()[1:]
        options = ("--ray", cluster.address, "--replicas", args.replicas)
        with server(args.bundle, folder, *options) as client:
            talkers = Talkers(client, 2 * args.replicas)

            def note(what: str, begin_s: float) -> None:
                time.sleep(1)
                while client.get("/health").json().get("up") != args.replicas:
                    assert time.monotonic() < begin_s + 180, what
                    time.sleep(0.2)
                print(
                    f"{what}: all are up after {time.monotonic() - begin_s:.1f} s; so far "
                    f"{talkers.whole} streams are whole, {talkers.lost} lost, "
                    f"{len(talkers.wrong)} wrong",
                    flush=True,
                )

            note("start", time.monotonic())
            (victim, *_) = processes_with("serve", "--host")
            os.kill(victim, signal.SIGKILL)
            note("a replica was killed", time.monotonic())
            cluster.remove_node(nodes.pop())
            nodes.append(cluster.add_node(num_cpus=1))
            note("a node was replaced", time.monotonic())
            lost = talkers.lost
            (router,) = processes_with("serve", "--ray")
            os.kill(router, signal.SIGHUP)
            begin_s = time.monotonic()
            while metric(client, "tokenspeed_replica_restarts_total") < args.replicas + 2:
                assert time.monotonic() < begin_s + 300
                time.sleep(0.5)
            note("a rolling restart", begin_s)
            talkers.end()
            is_right = talkers.lost == lost and not talkers.wrong and talkers.whole > 0
            print(talkers.wrong[:3])
        left = processes_with("serve", "--host")
        print(f"{len(left)} replicas are left after the end")
        ray.shutdown()
        cluster.shutdown()
        return int(not is_right or bool(left))


def processes_with(*words: str) -> list[int]:
    """Processes whose command has some words of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if {COMMAND.encode(), *map(str.encode, words)} <= set(said):
            found.append(int(path.parent.name))
    return found


def kill_a_worker(rng: random.Random, job: Path) -> int:
    """Kill one of the processes that name a lease folder and are no driver; returns how many."""
    found = processes_with(str(job), "--leave-last")
    if not found:
        return 0
    os.kill(rng.choice(found), signal.SIGKILL)
    return 1


def plan_of(model: Path, folder: Path, name: str, agents: int, turns: int) -> Path:
    """A bundle for so many conversations."""
    spec = folder / f"{name}.yaml"
    spec.write_text(
        f"version: 1\nmodel: {{path: {model.resolve()}, weights: fp32}}\ntarget: {{gpu: cpu}}\n"
        f"workload: {{kind: agentic, first_turn_tokens: 96, turn_tokens: 24, turns: {turns}, "
        f"output_tokens: 8, concurrency: {agents}}}\nspeculation: 'off'\n",
        encoding="utf-8",
    )
    assert start(["plan", spec, "-o", folder / name], folder / "plan.log").wait() == 0, (
        folder / "plan.log"
    ).read_text(encoding="utf-8")
    return folder / name


def talk(client: Any, number: int, turns: int, session: bool) -> None:
    """A conversation: each turn has all before it, and its own answer."""
    rng = random.Random(number)
    ids = [1 + rng.randrange(200) for _ in range(96)]
    for _ in range(turns):
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 8, "return_token_ids": True}
        if session:
            body["user"] = f"agent-{number}"
        answer = client.post("/v1/completions", json=body | {"temperature": 0})
        answer.raise_for_status()
        ids = ids + answer.json()["choices"][0]["token_ids"]
        ids = ids + [1 + rng.randrange(200) for _ in range(24)]


def hit_rate(client: Any, args: argparse.Namespace, session: bool) -> tuple[float, float]:
    """The share of prompt tokens that were cached, and seconds."""
    before = [
        metric(client, f"tokenspeed_{name}_total")
        for name in ("cached_prompt_tokens", "prompt_tokens")
    ]
    begin_s = time.monotonic()
    with ThreadPoolExecutor(args.agents) as pool:
        list(pool.map(lambda number: talk(client, number, args.turns, session), range(args.agents)))
    after = [
        metric(client, f"tokenspeed_{name}_total")
        for name in ("cached_prompt_tokens", "prompt_tokens")
    ]
    cached, total = (new - old for new, old in zip(after, before, strict=True))
    return cached / total, time.monotonic() - begin_s


def run_router(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        folder = Path(scratch)
        one = plan_of(args.model, folder, "one", args.agents, args.turns)
        each = plan_of(args.model, folder, "each", args.agents // args.replicas, args.turns)
        with server(one, folder) as client:
            alone, seconds = hit_rate(client, args, session=False)
        print(
            f"one engine for {args.agents} agents of {args.turns} turns: {alone:.4f} of the "
            f"prompt tokens are cached, {seconds:.0f} s",
            flush=True,
        )
        worst = 1.0
        for session in (True, False):
            with server(each, folder, "--replicas", args.replicas) as client:
                rate, seconds = hit_rate(client, args, session)
            worst = min(worst, rate / alone)
            kind = "names of sessions" if session else "prefixes alone"
            print(
                f"{args.replicas} replicas, {kind}: {rate:.4f}, {rate / alone:.3f} of one "
                f"engine's, {seconds:.0f} s",
                flush=True,
            )
        return int(worst < 0.95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    for name, run in (("leases", run_leases), ("ray", run_ray), ("mixed", run_mixed)):
        mode = modes.add_parser(name)
        mode.set_defaults(run=run)
        mode.add_argument("bundle", type=Path)
        mode.add_argument("--rows", type=int, default=2000)
        mode.add_argument("--shards", type=int, default=40)
        mode.add_argument("--kills", type=int, default=20)
        mode.add_argument("--pause", type=float, default=2.0, help="Seconds between two kills.")
        mode.add_argument("--seed", type=int, default=0)
        if name == "leases":
            mode.add_argument("--workers", type=int, default=4)
        elif name == "mixed":
            mode.add_argument("other", type=Path)
        else:
            mode.add_argument("--nodes", type=int, default=4)
            mode.add_argument("--drivers", type=int, default=2, help="Drivers that are killed.")
            mode.add_argument("--folder", type=Path, help="Is kept, so that another call goes on.")
            mode.add_argument("--seconds", type=float, default=1e9, help="Of this call.")
    mode = modes.add_parser("serve")
    mode.set_defaults(run=run_serve)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--replicas", type=int, default=4)
    mode = modes.add_parser("router")
    mode.set_defaults(run=run_router)
    mode.add_argument("model", type=Path)
    mode.add_argument("--agents", type=int, default=64)
    mode.add_argument("--turns", type=int, default=12)
    mode.add_argument("--replicas", type=int, default=4)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
