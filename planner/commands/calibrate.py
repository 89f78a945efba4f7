"""`tokenspeed calibrate`: measure this machine on probes, and write its profile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.advisor import calibration
from tokenspeed_plan.planner.commands.calibrate_history import calibrate_from_history, write_profile
from tokenspeed_plan.planner.commands.calibrate_ranks import (
    is_rank,
    measure_rank,
    with_rank_sums,
)
from tokenspeed_plan.planner.compile import Model, build_bundle
from tokenspeed_plan.planner.machines.hardware import FP8_CLASSES, Profile, read_profile
from tokenspeed_plan.planner.passes.pipeline import PassOptions
from tokenspeed_plan.plans.bundle import save_plan
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.types import Phase

if TYPE_CHECKING:
    from tokenspeed_plan.plans.schema import Plan
    from tokenspeed_plan.runtime.bench.host_terms import HostTerms
    from tokenspeed_plan.runtime.bench.machine import Machine

FEW = (1, 2, 4, 16, 32)
MANY = (*FEW, 64, 128, 256)
# Sequences that are measured, by the tokens of context that each of them has.
BATCHES: Mapping[str, Mapping[int, Sequence[int]]] = {
    "cuda": {1024: MANY, 16_384: FEW},
    "cpu": {128: FEW},
}
CHUNK = {"cuda": 4096, "cpu": 128}
PROMPTS = 4  # that share a chunk
DRAFTS = {"cuda": 3, "cpu": 0}  # of each sequence, where the tokens of a delta rule are timed
DRAFTING = (1, 4, 16)  # sequences at once that draft


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The options of `tokenspeed calibrate`; `out` is None only with `from_history`."""

    out: Path | None
    base: str | None
    device: str | None
    from_history: bool


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The profile, as YAML.")
@click.option(
    "--base",
    help="The profile whose data-sheet numbers stay, or its .yaml (default: by the GPU's name).",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU, where there is one."
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
    elif given.out is None:
        raise click.UsageError("Missing option '-o' / '--out'.")
    else:
        _calibrate(given, given.out)


def _calibrate(options: CalibrateOptions, out: Path) -> None:
    from tokenspeed_plan.runtime.bench.machine import provenance, this_machine

    device, name = this_machine(options.device)
    base = calibration.base_profile(options.base or name)
    if is_rank():
        measure_rank(base)
        return
    click.echo(f"measuring {name}, from the profile of {base.name}", err=True)
    profile, machine = _measure(base, device)
    if device == "cuda":
        profile = with_rank_sums(profile)
    samples = list(_samples(profile, machine, device))
    result = calibration.fit(samples, machine.launch_us)
    profile = _with_host(profile, machine, device)
    probes = f"{', '.join(_probes(device))}, {calibration.LAYERS} layers each"
    text = f"`tokenspeed calibrate` on {name}: {len(samples)} kernels of {probes}"
    measured = {"machine": name, "date": date.today().isoformat(), **provenance(device)}
    profile = calibration.calibrated(profile, result, machine.launch_us, text, measured)
    _report(result)
    _write(profile, name, out)


def _with_host(profile: Profile, machine: Machine, device: str) -> Profile:
    """The profile with the host's work for a step of the engine."""
    name = _probes(device)[0]
    with tempfile.TemporaryDirectory() as folder:
        roofline = Path(folder) / "bare.yaml"
        text = calibration.dump(calibration.bare(profile), "A roofline without waiting.")
        roofline.write_text(text, encoding="utf-8")
        terms = _Probe(name, roofline, Path(folder) / name, machine, device).host_terms()
    numbers = {f"host_{key}": value for key, value in asdict(terms).items()}
    text = f"`tokenspeed calibrate`: steps of the engine on {name}, less what it waited for tokens"
    click.echo(
        f"the host works {terms.step_us:.0f} us for a step, {terms.seq_us:.2f} for each sequence, "
        f"{terms.prompt_us:.0f} for each new prompt",
        err=True,
    )
    return calibration.with_numbers(profile, "host", numbers, text)


def _write(profile: Profile, name: str, out: Path) -> None:
    text = calibration.dump(profile, f"Measured by `tokenspeed calibrate` on {name}.")
    read_profile(text, str(out))
    write_profile(text, out)


def _measure(profile: Profile, device: str) -> tuple[Profile, Machine]:
    """Measure the rates of the machine itself."""
    from tokenspeed_plan.runtime.bench.machine import host_bytes_per_s, measure_machine, sizes

    machine = measure_machine(device)
    peak = profile.numbers["peak_bytes_per_s"].value
    numbers = {
        "read_bytes_per_s": machine.read_bytes_per_s,
        "launch_us": machine.launch_us,
        "host_bytes_per_s": host_bytes_per_s(device),
        "peak_bytes_per_s": max(peak, machine.read_bytes_per_s),
        "matrix_share": 1.0,
        **sizes(device),
    }
    rates: Mapping[str, float] = {}
    if device == "cuda":
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
    measured = calibration.with_numbers(profile, "machine", changed, text, matrix_flops_per_s=rates)
    return measured, machine


def _probes(device: str) -> tuple[str, ...]:
    if device == "cuda":
        return calibration.PROBES
    return (calibration.SMALL_PROBE,)


def _samples(profile: Profile, machine: Machine, device: str) -> Iterator[calibration.Sample]:
    """Measure every kernel of the probes, in decode and in prefill."""
    with tempfile.TemporaryDirectory() as folder:
        roofline = Path(folder) / "bare.yaml"
        text = calibration.dump(calibration.bare(profile), "A roofline without waiting.")
        roofline.write_text(text, encoding="utf-8")
        for name in _probes(device):
            probe = _Probe(name, roofline, Path(folder) / name, machine, device)
            yield from probe.samples()
            if device == "cuda" and "fp8" in profile.matrix_flops_per_s:
                yield from probe.fp8_samples()
        if calibration.functions_of(profile):
            text = calibration.dump(calibration.bare(profile, True), "A roofline with libraries.")
            roofline.write_text(text, encoding="utf-8")
            for name in _probes(device):
                probe = _Probe(name, roofline, Path(folder) / name, machine, device)
                yield from probe.library_samples()


class Batch(NamedTuple):
    """What a step computes: its sequences, and of each the new tokens and the context."""

    phase: Phase
    num_seqs: int
    new_tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class _Probe:
    """One probe on one machine.

    Attributes:
        name: a published model.
        roofline: the profile by which its plans are priced.
        folder: where its plans go.
    """

    name: str
    roofline: Path
    folder: Path
    machine: Machine
    device: str

    def samples(self) -> Iterator[calibration.Sample]:
        """Decode in short and long contexts, prefill of a prompt and of several, and drafts.

        Each is in its own plan, whose programs are priced for what is measured.
        """
        for context, batches in BATCHES[self.device].items():
            decode = [Batch("decode", num_seqs, 1, context) for num_seqs in batches]
            yield from self._replay(f"decode-{context}", 2 * context, decode)
        chunk = CHUNK[self.device]
        part = chunk // PROMPTS  # in the middle of its prompt
        lone = [Batch("prefill", 1, part, (chunk + part) // 2), Batch("prefill", 1, chunk, chunk)]
        yield from self._replay("prefill", chunk, lone, prompts=True)
        several = [Batch("prefill", PROMPTS, part, part)]
        yield from self._replay("prompts", part, several, prompts=True)
        depth = DRAFTS[self.device]
        if depth:
            context = min(BATCHES[self.device])
            drafts = [Batch("decode", num_seqs, depth + 1, context) for num_seqs in DRAFTING]
            for sample in self._replay("drafts", 2 * context, drafts, depth=depth):
                if sample.waiting_tokens:
                    yield sample

    def library_samples(self) -> Iterator[calibration.Sample]:
        """Those calls of libraries in prefill of a chunk that are right here."""
        chunk = CHUNK[self.device]
        batches = [Batch("prefill", 1, size, size) for size in (chunk // 4, chunk)]
        for sample in self._replay("libraries", chunk, batches):
            if sample.op_class in LIBRARY_FUNCTIONS:
                yield sample

    def fp8_samples(self) -> Iterator[calibration.Sample]:
        """Products of FP8: weights that are converted in decode, elements as they are in prefill.

        All else is as in bf16, and measured there.
        """
        context, batches = next(iter(BATCHES[self.device].items()))
        decode = [Batch("decode", num_seqs, 1, context) for num_seqs in batches]
        chunk = CHUNK[self.device]
        prefill = [Batch("prefill", 1, size, size) for size in (chunk // 4, chunk // 2, chunk)]
        found = [
            *self._replay("fp8-decode", 2 * context, decode, weights="fp8", quantises=False),
            *self._replay("fp8-prefill", chunk, prefill, weights="fp8", quantises=True),
        ]
        yield from (sample for sample in found if sample.op_class in FP8_CLASSES)

    def host_terms(self) -> HostTerms:
        """The host's work for a step, with as many sequences as decode is measured with."""
        from tokenspeed_plan.runtime.bench.host_terms import WaitingLaunch, measure_host
        from tokenspeed_plan.runtime.bench.prepare import prepare
        from tokenspeed_plan.runtime.engine import Engine
        from tokenspeed_plan.runtime.loading.engine_loader import default_launch

        context, batches = next(iter(BATCHES[self.device].items()))
        plan, folder = self._planned("host", 2 * context, max(batches))
        launch = WaitingLaunch(default_launch(plan), self.device == "cpu")
        engine = Engine(plan, prepare(plan, folder, None, launch))
        return measure_host(engine, launch, batches)

    def _replay(
        self,
        name: str,
        tokens: int,
        batches: Sequence[Batch],
        prompts: bool = False,
        depth: int = 0,
        weights: str = "",
        quantises: bool | None = None,
    ) -> Iterator[calibration.Sample]:
        """Measure batches on a plan for sequences of so many tokens; see `probe_spec`."""
        from tokenspeed_plan.runtime.bench.machine import release
        from tokenspeed_plan.runtime.bench.prepare import prepare
        from tokenspeed_plan.runtime.bench.replay import Replay

        max_seqs = max(batch.num_seqs for batch in batches)
        plan, folder = self._planned(name, tokens, max_seqs, prompts, depth, weights, quantises)
        executor = prepare(plan, folder, None)
        kernels = {kernel.name: kernel for kernel in plan.kernels}
        for batch in batches:
            measured = Replay(plan, executor, *batch).measure(self.machine)
            yield from calibration.samples(measured, kernels)
        del executor
        release()

    def _planned(
        self,
        name: str,
        tokens: int,
        max_seqs: int,
        prompts: bool = False,
        depth: int = 0,
        weights: str = "",
        quantises: bool | None = None,
    ) -> tuple[Plan, Path]:
        """A plan for sequences of so many tokens, and its folder; see `probe_spec`."""
        chunk = CHUNK[self.device]
        weights = weights or ("bf16" if self.device == "cuda" else "fp32")
        spec = calibration.probe_spec(
            str(self.roofline), weights, tokens, chunk, max_seqs, prompts, depth
        )
        model = Model(calibration.probe(self.name), None, None, {}, {}, weights=weights)
        options = PassOptions(quantises=quantises)
        bundle = build_bundle(spec, model, default_cache(), options=options)
        plan = bundle.plan
        folder = self.folder / name
        save_plan(plan, folder, bundle.sources, bundle.cubins)
        click.echo(f"probing {self.name}: {len(plan.kernels)} kernels", err=True)
        return plan, folder


def _report(result: calibration.Fit) -> None:
    click.echo("a kernel waits, then takes a multiple of its roofline time:", err=True)
    for name, residual in result.residuals.items():
        wait_us = result.waits_us[name]
        error = result.errors[name]
        fitted = f"{wait_us:>6.2f} us {residual:>6.2f} x"
        line = f"  {name:<18} {fitted}  (left over: {error:.0%})"
        click.echo(line, err=True)
    if result.delta_token_us is not None:
        click.echo(
            f"  a token of the delta rule after another: {result.delta_token_us:.2f} us", err=True
        )
