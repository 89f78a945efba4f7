"""Compile kernels ahead of time, for a GPU that need not be there.

Each kernel is compiled in a worker process, without line information, with floating-point
contraction pinned, and from a text without a path: its bytes depend on nothing but text, options,
architecture and Triton. Results are cached by content; a damaged entry is compiled again. What
others could have written is not trusted: a cubin runs with all rights of its user.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.kernel_file import first_warps, load_function
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.plans.types import WARP_SIZE, DType

CACHE_VERSION = 4
POINTERS: dict[DType, str] = {
    "bf16": "*bf16",
    "fp32": "*fp32",
    "fp64": "*fp64",
    "fp8": "*fp8e4nv",
    "fp4": "*i32",  # words of eight elements
    "i32": "*i32",
    "i64": "*i64",
}
# Prefixes of variables that Triton, LLVM and ptxas read. No cache key holds them, so workers unset
# them.
SWITCHES = ("TRITON_", "MLIR_", "LLVM_", "DISABLE_", "NVPTX_", "PTXAS_", "USE_IR_LOC", "ALLOW_LHS_")


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel to compile for the compute capability `sm`."""

    kernel: KernelSpec
    source: str
    sm: int

    @property
    def key(self) -> str:
        """Digest of everything that the result depends on."""
        launch = self.kernel.launch
        assert launch is not None
        inputs = (
            CACHE_VERSION,
            compiler_name(),
            self.sm,
            self.source,
            signature(self.kernel),
            launch.num_warps,
            launch.num_stages,
        )
        return sha256(canonical(inputs))


@dataclass(frozen=True, slots=True)
class Compiled:
    """The result of a compilation, or its `error`.

    Attributes:
        cubin: the binary.
        ptx: its text.
        registers: of a thread.
        spill_bytes: stack of a thread; all of it is spilled registers.
        shared_bytes: shared memory of a program.
        error: what went wrong, or empty.
    """

    cubin: bytes = b""
    ptx: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""


def compiler_name() -> str:
    """The compiler and its version.

    Raises:
        SpecError: Triton is not installed.
    """
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError as error:
        raise SpecError(
            "Triton is not installed, so kernels cannot be compiled", "pass `--no-compile`"
        ) from error


def signature(kernel: KernelSpec) -> dict[str, str]:
    """Triton's type of each launch argument by name: pointers for tensors and tables."""
    types: dict[str, str] = {}
    for param in kernel.params:
        dtype = param.tensor.dtype
        types[param.name] = POINTERS[dtype] if param.tensor.shape else dtype
    return types


def default_cache() -> Path:
    """Where compiled kernels are kept: `$TOKENSPEED_CACHE`, else the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TOKENSPEED_CACHE") or home / "tokenspeed-plan") / "cubin"


def compile_all(jobs: Iterable[Job], cache: Path) -> dict[str, Compiled]:
    """Results by `Job.key`; what is not in the cache is compiled on all cores.

    Raises:
        SpecError: a worker died, or others may write to the cache.
    """
    open_cache(cache)
    todo = {job.key: job for job in jobs}
    done, missing = {}, []
    for key, job in todo.items():
        cached = _recall(cache, key)
        if cached is None:
            missing.append(job)
        else:
            done[key] = cached
    if missing:
        done |= _compile_missing(missing, cache)
    return done


def open_cache(cache: Path) -> None:
    """Make the folder of a cache; only its user may write there.

    Raises:
        SpecError: the folder is another user's, or others may write to it.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = cache.stat()
    if not _is_private(status):
        mode = stat.S_IMODE(status.st_mode)
        raise SpecError(
            f"others can write to the cache of compiled kernels `{cache}` (mode {mode:o}, of user "
            f"{status.st_uid})",
            "delete it, or name another folder with the variable `TOKENSPEED_CACHE`",
        )


def _is_private(status: os.stat_result) -> bool:
    """Whether only this user, and root, can write to a file or folder."""
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.getuid()) and not others_write


def _compile_missing(missing: list[Job], cache: Path) -> dict[str, Compiled]:
    done = {}
    workers = min(os.cpu_count() or 1, len(missing))
    with compiler_processes(workers) as pool:
        try:
            for job, compiled in zip(missing, pool.map(compile_kernel, missing), strict=True):
                _remember(cache, job.key, compiled)
                done[job.key] = compiled
        except BrokenProcessPool as error:
            hint = "close other programs if memory is short; `--no-compile` plans without compiling"
            raise SpecError("a worker process died while it compiled kernels", hint) from error
    return done


@contextmanager
def compiler_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, which start at their first jobs.

    A new Python looks for modules in the current folder first, also for those that start a worker:
    `PYTHONSAFEPATH` forbids it.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        _variable("PYTHONSAFEPATH", "1"),
        tempfile.TemporaryDirectory(prefix="tokenspeed-") as scratch,
        ProcessPoolExecutor(count, spawn, _start_worker, (scratch,)) as pool,
    ):
        yield pool


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2)


def _start_worker(scratch: str) -> None:
    """Prepare a worker process, before it imports Triton.

    `ptxas` for sm_100 (12.9) allocates registers by the addresses of its objects, so that one PTX
    gives several cubins. Without address space randomisation, which the programs that a worker
    starts inherit, and with arguments of one length (`_name_alike`), it gives one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "personality"):
        libc.personality(ADDR_NO_RANDOMIZE)
    for name in [name for name in os.environ if name.startswith(SWITCHES)]:
        del os.environ[name]
    os.environ |= {
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_CACHE_DIR": scratch,
        "TRITON_ALWAYS_COMPILE": "1",
    }


def _name_alike() -> None:
    """Let Triton run `ptxas` with the same words in every checkout and for every `TMPDIR`.

    The lengths of its own path and of its files' move its addresses. So it runs in the folder of
    its files, and is told names without folders.
    """
    from triton.backends.nvidia import compiler

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        names = [os.path.basename(word) if os.path.isabs(word) else word for word in command]
        folder = os.path.dirname(command[-1])
        return subprocess.run(names, executable=command[0], cwd=folder, **options)

    compiler.subprocess = SimpleNamespace(**vars(subprocess) | {"run": run})


def compile_kernel(job: Job) -> Compiled:
    """Compile one kernel in this process."""
    import triton
    from triton.backends.compiler import GPUTarget

    _name_alike()
    kernel, launch = job.kernel, job.kernel.launch
    assert launch is not None
    function = load_function(kernel, job.source)
    options = {
        "num_warps": first_warps(function, launch),
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
    try:
        compiled = triton.compile(
            _source(kernel, function), target=GPUTarget("cuda", job.sm, WARP_SIZE), options=options
        )
    except (OSError, MemoryError):  # the machine's fault, not the kernel's
        raise
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {str(error.__cause__ or error).strip()}")
    if compiled.metadata.num_warps != launch.num_warps:
        return Compiled(error=f"its partitions have {compiled.metadata.num_warps} warps")
    cubin: bytes = compiled.asm["cubin"]
    registers, stack_bytes = _resources(cubin)
    return Compiled(
        cubin=cubin,
        ptx=compiled.asm["ptx"],
        registers=registers,
        spill_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
    )


def _source(kernel: KernelSpec, function: Any) -> Any:
    """What Triton compiles: a function, and the types of its arguments."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    make = ASTSource
    if function.is_gluon():
        make = GluonASTSource
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(kernel.tensors))}
    return make(fn=function, signature=signature(kernel), constexprs={}, attrs=aligned)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin, by the `cuobjdump` that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def _recall(cache: Path, key: str) -> Compiled | None:
    """The result that the cache holds, or None where it has none, a damaged or a foreign one."""
    try:
        report = json.loads(_read_own(cache / f"{key}.json"))
        cubin = _read_own(cache / f"{key}.cubin")
        facts = report["facts"]
        if report["digest"] != _digest(key, facts, cubin):
            return None
        return _compiled(cubin, facts)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _read_own(path: Path) -> bytes:
    """The bytes of a file that only this user can have written.

    Raises:
        OSError: it cannot be read.
        ValueError: others can have written it, or it is a link or no file.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or not _is_private(status):
        raise ValueError(f"`{path}` is not this user's file")
    return path.read_bytes()


def _compiled(cubin: bytes, facts: object) -> Compiled:
    """The result with these facts.

    Raises:
        TypeError: a fact is missing, unknown, or of another type.
    """
    known = asdict(Compiled())
    del known["cubin"]
    if not isinstance(facts, dict) or facts.keys() != known.keys():
        raise TypeError("other facts")
    for name, empty in known.items():
        if type(facts[name]) is not type(empty):
            raise TypeError(f"`{name}` is {facts[name]!r}")
    return Compiled(cubin, **facts)


def _digest(key: str, facts: object, cubin: bytes) -> str:
    return sha256(canonical((key, facts, sha256(cubin))))


def _remember(cache: Path, key: str, compiled: Compiled) -> None:
    """Write a result to the cache, its report last: an entry without a report does not exist.

    An error is not kept, since it may be the machine's.
    """
    if compiled.error:
        return
    facts = asdict(compiled)
    del facts["cubin"]
    report = {"digest": _digest(key, facts, compiled.cubin), "facts": facts}
    files = {f"{key}.cubin": compiled.cubin, f"{key}.json": json.dumps(report).encode()}
    for name, data in files.items():
        draft = cache / f".{name}.{os.getpid()}"
        with open(draft, "wb", opener=_for_this_user) as file:
            file.write(data)
        draft.replace(cache / name)


def _for_this_user(path: str, flags: int) -> int:
    """Open a new file that only this user can read and write."""
    return os.open(path, flags, 0o600)
