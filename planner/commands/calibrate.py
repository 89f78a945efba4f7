"""`tokenspeed calibrate`: measure this machine on probes, and write its profile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.advisor import calibration
from tokenspeed_plan.planner.advisor.held_out import error_share
from tokenspeed_plan.planner.advisor.measured_probes import (
    HostLine,
    MachineLine,
    Measured,
    StepLine,
    append,
    kernel_lines,
    read_measured,
)
from tokenspeed_plan.planner.advisor.probe_plans import (
    Batch,
    ProbePlan,
    Work,
    host_work,
    planned,
    works,
)
from tokenspeed_plan.planner.commands.calibrate_history import calibrate_from_history, write_profile
from tokenspeed_plan.planner.commands.calibrate_ranks import (
    is_rank,
    measure_rank,
    with_rank_sums,
)
from tokenspeed_plan.planner.machines.hardware import (
    FP8_CLASSES,
    Profile,
    read_profile,
    to_hardware,
)
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.bench.host_terms import HostTerms
    from tokenspeed_plan.runtime.bench.machine import Machine

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The options of `tokenspeed calibrate`.

    Attributes:
        out: the profile; None with `from_history`, or where only plans are made.
        base: the profile to start from.
        device: `cpu` or `cuda`; None takes the GPU, where there is one.
        plans: a folder of the probes' plans.
        samples: where to keep what is measured.
        from_samples: what was measured before, in place of measuring.
        from_history: learn from the runs of this machine instead.
    """

    out: Path | None
    base: str | None
    device: str | None
    plans: Path | None
    samples: Path | None
    from_samples: Path | None
    from_history: bool


@click.command()
@click.option("-o", "--out", type=Folder, help="The profile, as YAML.")
@click.option(
    "--base",
    help="The profile whose data-sheet numbers stay, or its .yaml (default: by the GPU's name).",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU, where there is one."
)
@click.option(
    "--plans",
    type=Folder,
    help="Keep the probes' plans in this folder and take those in it. Without --out they are only "
    "made, for --base, which needs no GPU.",
)
@click.option("--samples", type=Folder, help="Add what is measured to this file, as it comes.")
@click.option(
    "--from-samples", type=Folder, help="Measure nothing: fit what --samples has kept before."
)
@click.option(
    "--from-history",
    is_flag=True,
    help="Measure nothing: learn from what `run`, `serve` and `bench` have noted here.",
)
def calibrate(**options: Any) -> None:
    """Measure this machine: read bandwidth, launches, matrix rates, and each class of kernel.

    With several GPUs also what 2, 4 and 8 of them need to add up and to gather, by bytes.
    """
    given = CalibrateOptions(**options)
    if given.from_history:
        calibrate_from_history(given.base, given.device, given.out)
    elif given.out is not None:
        _calibrate(given, given.out)
    elif given.plans is not None:
        _make_plans(_base(given), given.plans)
    else:
        raise click.UsageError("Missing option '-o' / '--out'.")


def _base(options: CalibrateOptions) -> Profile:
    """The profile to start from."""
    if options.base is not None:
        return calibration.base_profile(options.base)
    from tokenspeed_plan.runtime.bench.machine import this_machine

    return calibration.base_profile(this_machine(options.device)[1])


def _make_plans(base: Profile, folder: Path) -> None:
    for probe in _probes(base):
        for work in (*works(base), host_work(_device(base))):
            click.echo(f"planning {probe}, {work.name}", err=True)
            planned(probe, work, base, folder)


def _device(base: Profile) -> str:
    return "cuda" if base.sm else "cpu"


def _calibrate(options: CalibrateOptions, out: Path) -> None:
    base = _base(options)
    if is_rank():
        measure_rank(base)
        return
    if options.from_samples is None:
        with _kept(options.samples) as samples, _kept(options.plans) as plans:
            _measure(base, plans, samples)
            measured = read_measured(samples)
    else:
        measured = read_measured(options.from_samples)
    profile = _with_machine(base, measured.machine)
    if options.from_samples is None and _device(base) == "cuda":
        profile = with_rank_sums(profile)
    profile = _fitted(profile, base, measured)
    text = calibration.dump(profile, f"Measured by `tokenspeed calibrate` on {_name(measured)}.")
    read_profile(text, str(out))
    write_profile(text, out)


def _name(measured: Measured) -> str:
    return measured.machine.name


@contextmanager
def _kept(path: Path | None) -> Iterator[Path]:
    """The path, or one that is forgotten afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "calibration"


def _measure(base: Profile, plans: Path, samples: Path) -> None:
    """Measure the machine, every kernel of the probes, and the host; add lines as they come."""
    from tokenspeed_plan.runtime.bench.machine import measure_machine

    device = _device(base)
    ready = [(probe, planned(probe, work, base, plans)) for probe, work in _all_works(base)]
    first = _probes(base)[0]
    host = planned(first, host_work(device), base, plans)
    machine = measure_machine(device)
    click.echo(f"measuring {machine.name}, from the profile of {base.name}", err=True)
    append(samples, _machine_line(machine, device))
    append(samples, HostLine(probe=first, **asdict(_host_terms(host, device))))
    for probe, each in ready:
        click.echo(f"probing {probe}, {each.work.name}", err=True)
        for line in _steps(probe, each, machine):
            append(samples, line)


def _all_works(base: Profile) -> Iterator[tuple[str, Work]]:
    """Each work of all probes, so that half of them say something of each class."""
    for work in works(base):
        for probe in _probes(base):
            yield probe, work


def _probes(base: Profile) -> tuple[str, ...]:
    if base.sm:
        return calibration.PROBES
    return (calibration.SMALL_PROBE,)


def _machine_line(machine: Machine, device: str) -> MachineLine:
    from tokenspeed_plan.runtime.bench.machine import host_bytes_per_s, provenance, sizes

    return MachineLine(
        **asdict(machine),
        host_bytes_per_s=host_bytes_per_s(device),
        sizes=sizes(device),
        versions=provenance(device) | {"date": date.today().isoformat()},
    )


def _steps(probe: str, each: ProbePlan, machine: Machine) -> Iterator[StepLine]:
    """The measured steps of a plan, with those kernels that its work takes."""
    from tokenspeed_plan.runtime.bench.machine import release
    from tokenspeed_plan.runtime.bench.prepare import prepare
    from tokenspeed_plan.runtime.bench.replay import Replay

    executor = prepare(each.plan, each.folder, None)
    kernels = {kernel.name: kernel for kernel in each.plan.kernels}
    for batch, roofs in zip(each.work.batches, each.roofs, strict=True):
        measured = Replay(each.plan, executor, *batch).measure(machine)
        samples = calibration.samples(measured, kernels, roofs)
        lines = kernel_lines(measured["kernels"], samples)
        taken = [line for line in lines if _is_taken(line.op_class, line.waiting_tokens, each.work)]
        yield _step_line(probe, each.work, batch, measured["measured_us"], taken)
    del executor
    release()


def _step_line(probe: str, work: Work, batch: Batch, taken_us: float, kernels: Any) -> StepLine:
    return StepLine(
        probe=probe, plan=work.name, **batch._asdict(), measured_us=taken_us, kernels=kernels
    )


def _is_taken(op_class: str, waiting_tokens: int, work: Work) -> bool:
    """Whether a kernel is a sample of this work; all else of it is measured by another one."""
    if work.takes == "drafts":
        return waiting_tokens > 0
    if work.takes == "libraries":
        return op_class in LIBRARY_FUNCTIONS
    return work.takes == "kernels" or op_class in FP8_CLASSES


def _host_terms(each: ProbePlan, device: str) -> HostTerms:
    """The host's work for a step, with as many sequences as decode is measured with."""
    from tokenspeed_plan.runtime.bench.host_terms import WaitingLaunch, measure_host
    from tokenspeed_plan.runtime.bench.prepare import prepare
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.loading.engine_loader import default_launch

    launch = WaitingLaunch(default_launch(each.plan), device == "cpu")
    engine = Engine(each.plan, prepare(each.plan, each.folder, None, launch))
    return measure_host(engine, launch, [batch.num_seqs for batch in each.work.batches])


def _with_machine(profile: Profile, machine: MachineLine) -> Profile:
    """The profile with the measured rates of the machine itself."""
    peak = profile.numbers["peak_bytes_per_s"].value
    numbers = {
        "read_bytes_per_s": machine.read_bytes_per_s,
        "launch_us": machine.launch_us,
        "host_bytes_per_s": machine.host_bytes_per_s,
        "peak_bytes_per_s": max(peak, machine.read_bytes_per_s),
        "matrix_share": 1.0,
        **machine.sizes,
    }
    rates: Mapping[str, float] = {}
    if profile.sm:
        peak_flops = profile.matrix_flops_per_s["bf16"].value
        numbers["matrix_share"] = machine.matrix_flops_per_s / peak_flops
    else:
        rates = dict.fromkeys(profile.matrix_flops_per_s, machine.matrix_flops_per_s)
    changed = {
        name: value for name, value in numbers.items() if value != profile.numbers[name].value
    }
    text = (
        "`tokenspeed calibrate`: a large sum, a chain of tiny kernels, one large product, a large "
        "copy from the host"
    )
    return calibration.with_numbers(profile, "machine", changed, text, matrix_flops_per_s=rates)


def _fitted(profile: Profile, base: Profile, measured: Measured) -> Profile:
    """The profile with what the probes and the host took."""
    machine = measured.machine
    steps = measured.at_rates(to_hardware(base), to_hardware(profile))
    samples = [sample for step in steps for _, sample in step.kernels]
    result = calibration.fit(samples, machine.launch_us)
    error = error_share(steps, machine.launch_us)
    layers = f"{', '.join(measured.probes)}, {calibration.LAYERS} layers each"
    text = f"`tokenspeed calibrate` on {machine.name}: {len(samples)} kernels of {layers}"
    told = {"machine": machine.name, **machine.versions}
    _report(result)
    if error is not None:
        click.echo(f"steps of a probe that was held out: within {error:.0%} of each kind", err=True)
    if measured.host is not None:
        profile = _with_host(profile, measured.host)
    return calibration.calibrated(profile, result, machine.launch_us, text, told, error)


def _with_host(profile: Profile, host: HostLine) -> Profile:
    """The profile with the host's work for a step of the engine."""
    terms = host.model_dump(include={"step_us", "seq_us", "prompt_us", "prefill_us", "launch_us"})
    numbers = {f"host_{key}": value for key, value in terms.items()}
    text = (
        f"`tokenspeed calibrate`: steps of the engine on {host.probe}, less what it waited for "
        "tokens"
    )
    click.echo(
        f"the host works {host.step_us:.0f} us for a step, {host.prefill_us:.0f} more with "
        f"prompts, {host.seq_us:.2f} for each sequence, {host.prompt_us:.0f} for each new prompt, "
        f"{host.launch_us:.1f} for a launch",
        err=True,
    )
    return calibration.with_numbers(profile, "host", numbers, text)


def _report(result: calibration.Fit) -> None:
    click.echo("a kernel waits, then takes a multiple of its roofline time:", err=True)
    for name, residual in result.residuals.items():
        fitted = f"{result.waits_us[name]:>6.2f} us {residual:>6.2f} x"
        if name in result.matrix_residuals:
            fitted += f", {result.matrix_residuals[name]:.2f} x its products"
        click.echo(f"  {name:<18} {fitted}  (left over: {result.errors[name]:.0%})", err=True)
    if result.delta_token_us is not None:
        click.echo(
            f"  a token of the delta rule after another: {result.delta_token_us:.2f} us", err=True
        )
