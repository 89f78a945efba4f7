"""What the driver calls of Ray; the n-th task of workers ends as the script says."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    """Of Ray."""


class ScriptedRay:
    """Nodes by their resources, and what comes of the tasks that are given to actors."""

    def __init__(self, ends: list[Any], *nodes: dict[str, float]) -> None:
        self.ends = ends
        self.resources = list(nodes) or [{"CPU": 2.0}]
        self.placed: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.tasks: list[tuple[Any, ...]] = []  # their arguments

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of Ray."""

        def placement_group(bundles: Any, strategy: str) -> Any:
            self.placed.append((bundles, strategy))
            return len(self.placed)

        group = SimpleNamespace(placement_group=placement_group)
        strategies = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group: group)
        modules = {
            "ray": self,
            "ray.exceptions": SimpleNamespace(RayError=RayError),
            "ray.util": SimpleNamespace(placement_group=group, scheduling_strategies=strategies),
            "ray.util.placement_group": group,
            "ray.util.scheduling_strategies": strategies,
        }
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": each} for each in self.resources]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for each in self.resources for name in each}
        return {name: sum(each.get(name, 0) for each in self.resources) for name in names}

    def remote(self, actor: Any) -> Any:
        def submit(*args: Any) -> int:
            self.tasks.append(args)
            return len(self.tasks)

        def placed(**options: Any) -> Any:
            self.options.append(options)
            worker = SimpleNamespace(work=SimpleNamespace(remote=submit))
            return SimpleNamespace(remote=lambda: worker)

        return SimpleNamespace(options=placed)

    def wait(
        self, tasks: list[int], timeout: float, num_returns: int = 1
    ) -> tuple[list[int], list[int]]:
        return tasks[:1], tasks[1:]

    def get(self, task: int) -> tuple[int, str]:
        end = self.ends[task - 1]
        if isinstance(end, Exception):
            raise end
        return end  # type: ignore[no-any-return]
