"""Choose among the tilings of each kernel by what the compiler says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokenspeed_plan.codegen.build import Compiled, Job, compile_all, compiler_name
from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.plans.bundle import seal
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Binary, Plan


@dataclass
class KernelChoice:
    """First collects the tilings that a plan asks about, then answers with the first that fits the machine.

    A tiling fits when it compiles, spills no register and needs no more shared memory than a
    program may have.
    """

    hardware: HardwareSpec
    cache: Path
    asked: dict[str, list[Built]] = field(default_factory=dict)
    made: dict[str, Compiled] = field(default_factory=dict)  # by kernel name
    chosen: dict[str, Built] = field(default_factory=dict)  # by the name of the first tiling

    def ask(self, tilings: list[Built]) -> Built:
        """Note the tilings; the answer is not final."""
        self.asked[tilings[0].kernel.name] = tilings
        return tilings[0]

    def answer(self, tilings: list[Built]) -> Built:
        """The tiling that fits."""
        return self.chosen[tilings[0].kernel.name]

    def compile(self) -> None:
        """Compile the best tiling of each, then the next of those that do not fit, until all are settled.

        Raises:
            SpecError: no tiling of a kernel fits.
        """
        left = {name: list(tilings) for name, tilings in self.asked.items()}
        while left:
            jobs = {
                name: self._job(tilings[0])
                for name, tilings in left.items()
                if tilings[0].source is not None
            }
            results = compile_all(jobs.values(), self.cache)
            for name, tilings in list(left.items()):
                best = tilings.pop(0)
                result = results[jobs[name].key] if name in jobs else None
                if result is None or self._fits(result):
                    self.chosen[name] = best
                    self.made |= {best.kernel.name: result} if result else {}
                    del left[name]
                elif not tilings:
                    raise self._refused(best, result)

    def _job(self, built: Built) -> Job:
        assert built.source is not None
        return Job(built.kernel, built.source, self.hardware.sm)

    def _fits(self, made: Compiled) -> bool:
        return (
            not made.error
            and not made.spill_bytes
            and made.shared_bytes <= self.hardware.max_shared_bytes
        )

    def _refused(self, built: Built, made: Compiled) -> SpecError:
        shared = f"{made.shared_bytes} of {self.hardware.max_shared_bytes} bytes of shared memory"
        why = made.error or f"spills {made.spill_bytes} bytes, needs {shared}"
        target = f"{self.hardware.name} (sm_{self.hardware.sm})"
        return SpecError(
            f"no tiling of kernel `{built.kernel.name}` fits {target}; the last: {why}",
            "`--no-compile` plans without this proof; please report the kernel",
        )

    def cubins(self, plan: Plan) -> dict[str, bytes]:
        """Binaries by file name."""
        return {
            f"{kernel.name}.sm{self.hardware.sm}.cubin": self.made[kernel.name].cubin
            for kernel in plan.kernels
            if kernel.name in self.made
        }

    def sign(self, plan: Plan) -> Plan:
        """The plan with what the compiler made of its kernels."""
        binaries = tuple(
            Binary(
                kernel=kernel.name,
                sm=self.hardware.sm,
                cubin_sha256=sha256(made.cubin),
                registers=made.registers,
                spill_bytes=made.spill_bytes,
                shared_bytes=made.shared_bytes,
            )
            for kernel in plan.kernels
            if (made := self.made.get(kernel.name)) is not None
        )
        return seal(
            plan.model_copy(update={"binaries": binaries, "kernel_compiler": compiler_name()})
        )
