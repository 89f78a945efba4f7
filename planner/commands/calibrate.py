"""`tokenspeed calibrate`: measure this machine on probes, and write its profile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.advisor import calibration as model
from tokenspeed_plan.planner.advisor.hardware import Profile, read_profile
from tokenspeed_plan.planner.compile import Model, build_bundle
from tokenspeed_plan.plans.bundle import save_plan
from tokenspeed_plan.plans.types import Phase

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.bench.machine import Machine

CONTEXTS = {"cuda": (1024, 16_384), "cpu": (128,)}
CHUNK = {"cuda": 4096, "cpu": 128}
BATCHES = (1, 2, 4, 16, model.MAX_SEQS)


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="The profile, as YAML."
)
@click.option(
    "--base", help="The profile whose data-sheet numbers stay (default: by the GPU's name)."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU, where there is one."
)
def calibrate(out: Path, base: str | None, device: str | None) -> None:
    """Measure this machine: read bandwidth, launches, matrix rates, and each class of kernel on probes."""
    from tokenspeed_plan.runtime.bench.machine import provenance, this_machine

    device, name = this_machine(device)
    profile = model.base_profile(base or name)
    click.echo(f"measuring {name}, from the profile of {profile.name}", err=True)
    profile, machine = _measure(profile, device)
    samples = list(_samples(profile, machine, device))
    found = model.fit(samples, machine.launch_us)
    measured = {"machine": name, "date": date.today().isoformat(), **provenance(device)}
    probes = f"{', '.join(_probes(device))}, {model.LAYERS} layers each"
    said = f"`tokenspeed calibrate` on {name}: {len(samples)} kernels of {probes}"
    done = model.calibrated(profile, found, machine.launch_us, said, measured)
    text = model.dump(done, f"Measured by `tokenspeed calibrate` on {name}.")
    read_profile(text, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    _report(found, out)


def _measure(profile: Profile, device: str) -> tuple[Profile, Machine]:
    """Rates of the machine itself."""
    from tokenspeed_plan.runtime.bench.machine import measure_machine, measure_sums, sizes

    machine = measure_machine(device)
    key = "bf16" if device == "cuda" else "fp32"
    peak = profile.numbers["peak_bytes_per_s"].value
    numbers = {
        "read_bytes_per_s": machine.read_bytes_per_s,
        "launch_us": machine.launch_us,
        "peak_bytes_per_s": max(peak, machine.read_bytes_per_s),
    }
    numbers |= sizes(device)
    if device == "cuda":
        numbers["matrix_share"] = machine.matrix_flops_per_s / profile.matrix_flops_per_s[key].value
        rates: Mapping[str, float] = {}
    else:
        numbers["matrix_share"] = 1.0
        rates = dict.fromkeys(profile.matrix_flops_per_s, machine.matrix_flops_per_s)
    kept = {name: value for name, value in numbers.items() if value != profile.numbers[name].value}
    said = "`tokenspeed calibrate`: a large sum, a chain of tiny kernels, one large product"
    done = model.with_numbers(profile, "machine", kept, said, matrix_flops_per_s=rates)
    done = _with_sums(done, measure_sums()) if device == "cuda" else done
    return done, machine


def _with_sums(profile: Profile, sums: dict[int, dict[int, float]]) -> Profile:
    """Large all-reduces as measured; small ones stay those of kernels in a graph."""
    if not sums:
        return profile
    data = profile.model_dump()
    data["sources"]["nccl"] = "`tokenspeed calibrate`: NCCL's all-reduce, launched one by one"
    data["all_reduce"]["two_shot"] = {"source": "nccl", "us": sums}
    return Profile.model_validate(data)


def _probes(device: str) -> tuple[str, ...]:
    return model.PROBES if device == "cuda" else (model.SMALL_PROBE,)


def _samples(profile: Profile, machine: Machine, device: str) -> Iterator[model.Sample]:
    """Every kernel of the probes, in decode and in prefill."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.yaml"
        bare.write_text(model.dump(model.bare(profile), "A roofline without waiting."))
        for name in _probes(device):
            yield from _probe(name, bare, Path(folder) / name, machine, device)


def _probe(
    name: str, bare: Path, bundle: Path, machine: Machine, device: str
) -> Iterator[model.Sample]:
    """Decode in short and in long contexts, and prefill of one chunk: each in a plan that is priced for just that."""
    chunk = CHUNK[device]
    for context in CONTEXTS[device]:
        decode = [Batch("decode", seqs, 1, context) for seqs in BATCHES]
        yield from _replayed(
            name, bare, bundle / f"decode-{context}", machine, device, 2 * context, decode
        )
    prefill = [Batch("prefill", 1, tokens, tokens) for tokens in (chunk // 4, chunk)]
    yield from _replayed(name, bare, bundle / "prefill", machine, device, chunk, prefill)


class Batch(NamedTuple):
    """What is replayed."""

    phase: Phase
    num_seqs: int
    new_tokens: int
    context: int


def _replayed(
    name: str,
    bare: Path,
    bundle: Path,
    machine: Machine,
    device: str,
    tokens: int,
    batches: Sequence[Batch],
) -> Iterator[model.Sample]:
    from tokenspeed_plan.runtime.bench.machine import release
    from tokenspeed_plan.runtime.bench.prepare import prepare
    from tokenspeed_plan.runtime.bench.replay import Replay

    spec = model.probe_spec(str(bare), device == "cuda", tokens, CHUNK[device])
    made = build_bundle(spec, Model(model.probe(name), None, None, {}, {}), default_cache())
    save_plan(made.plan, bundle, made.sources, made.cubins)
    click.echo(f"probing {name}: {len(made.plan.kernels)} kernels", err=True)
    executor = prepare(made.plan, bundle, None)
    kinds = {kernel.name: [part.kind for part in kernel.parts] for kernel in made.plan.kernels}
    for batch in batches:
        yield from model.samples(Replay(made.plan, executor, *batch).measure(machine), kinds)
    del executor
    release()


def _report(found: model.Fit, out: Path) -> None:
    click.echo("a kernel waits, then takes a multiple of its roofline time:", err=True)
    for name, residual in found.residuals.items():
        wait_us, left = found.waits_us[name], found.errors[name]
        click.echo(
            f"  {name:<18} {wait_us:>6.2f} us {residual:>6.2f} x  (left over: {left:.0%})", err=True
        )
    click.echo(f"wrote {out}; use it with `target: {{gpu: {out}}}`", err=True)
