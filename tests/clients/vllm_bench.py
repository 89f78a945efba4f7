"""vLLM's bench client from its wheel, without vLLM: python vllm_bench.py WHEEL_FOLDER OPTION ...

WHEEL_FOLDER holds `vllm/benchmarks` of an unpacked wheel. What these files import of the rest of
vLLM, which brings PyTorch, CUDA and the engine, is stood in for here: the tokenizer is
transformers', the parser argparse's, and the parts for pictures, sounds and adapters are names that
are never used.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

OWN = "vllm.benchmarks"


class Unused:
    """A name that is imported, and not used."""

    def __init__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return type(name, (Unused,), {})

    def placeholder_attr(self, name: str) -> Any:
        return Unused()


class _Rest(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of vLLM that are not the bench client's: each has every name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith("vllm.") and name != OWN and not name.startswith(f"{OWN}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = named  # type: ignore[method-assign]


def named(name: str) -> Any:
    """What stands in for a name of vLLM."""
    if name.startswith("__"):
        raise AttributeError(name)
    return KNOWN.get(name) or type(name, (Unused,), {})


def tokenizer_of(name: str, **_: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def nothing(*_: Any, **__: Any) -> None:
    pass


KNOWN: dict[str, Any] = {
    "FlexibleArgumentParser": argparse.ArgumentParser,
    "freeze_gc_heap": nothing,
    "get_tokenizer": tokenizer_of,
    "init_logger": logging.getLogger,
    "is_mistral_tokenizer": lambda _: False,
    "join_host_port": lambda host, port: f"{host}:{port}",
}


def main() -> None:
    folder, *options = sys.argv[1:]
    package = ModuleType("vllm")
    package.__path__ = [str(Path(folder, "vllm"))]
    sys.modules["vllm"] = package
    sys.meta_path.insert(0, _Rest())
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    asyncio.run(serve.main_async(parser.parse_args(options)))


if __name__ == "__main__":
    main()
