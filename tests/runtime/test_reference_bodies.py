"""Bodies that compute a batch in one of several ways, against loops over its tokens."""

from __future__ import annotations

from itertools import accumulate, pairwise
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.backend import ReferenceBackend
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.loading.weights import random_weights
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 16
HEADS = {"num_k_heads": KEY_HEADS, "num_v_heads": VALUE_HEADS, "dtype": "fp64"}
EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 16, 8


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def delta_by_token(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The delta rule of one sequence as its definition has it; a head's q, k, v are columns."""
    ys = []
    for t in range(len(q)):
        heads = []
        for b in range(VALUE_HEADS):
            group = b * KEY_HEADS // VALUE_HEADS
            columns = slice(group * KEY_DIM, (group + 1) * KEY_DIM)
            value = v[t, b * VALUE_DIM : (b + 1) * VALUE_DIM]
            state[b] = state[b] * decay[t, b].exp()
            error = beta[t, b] * (value - state[b].T @ k[t, columns])
            state[b] += torch.outer(k[t, columns], error)
            heads.append(state[b].T @ q[t, columns])
        ys.append(torch.cat(heads))
    return torch.stack(ys), state


@pytest.mark.parametrize("lengths", [(5,), (64,), (8, 8), (128, 128), (65,), (3, 70, 1), (2, 9)])
def test_chunks_of_any_length_equal_the_rule_token_by_token(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tokens, bounds = sum(lengths), [0, *accumulate(lengths)]
    q, k = (F.normalize(random(tokens, KEY_HEADS * KEY_DIM), dim=-1) for _ in range(2))
    v = random(tokens, VALUE_HEADS * VALUE_DIM)
    beta, decay = random(tokens, VALUE_HEADS).sigmoid(), -random(tokens, VALUE_HEADS).abs()
    state = random(2 * len(lengths), VALUE_HEADS, KEY_DIM, VALUE_DIM)
    src = torch.arange(len(lengths), dtype=torch.int32)
    dst = src + len(lengths)
    wanted = [
        delta_by_token(state[i].clone(), *(x[start:end] for x in (q, k, v, beta, decay)))
        for i, (start, end) in enumerate(pairwise(bounds))
    ]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    chunks = REFERENCE_BODIES["delta_chunk"](HEADS, q, k, v, beta, decay, cu_seqlens)
    (y,) = REFERENCE_BODIES["delta_scan"](HEADS, q, k, *chunks, cu_seqlens, src, dst, state)
    torch.testing.assert_close(y, torch.cat([each[0] for each in wanted]))
    torch.testing.assert_close(state[dst], torch.stack([each[1] for each in wanted]))


@pytest.mark.parametrize("tokens", [1, 3, 4, 40])
@pytest.mark.parametrize("start", [None, 2])
def test_experts_equal_a_loop_over_all_choices(tokens: int, start: int | None) -> None:
    """One by one where they are few, else sorted; of ranks, each has a part of the experts."""
    torch.manual_seed(tokens)
    attrs = {"num_experts": EXPERTS, "top_k": TOP_K}
    if start is not None:
        attrs["expert_start"] = start
    first = start or 0
    x, weights = random(tokens, HIDDEN), random(tokens, TOP_K)
    ids = torch.stack([torch.randperm(EXPERTS + 3)[:TOP_K] for _ in range(tokens)]).int()
    if start is None:
        ids %= EXPERTS
    up, down = random(EXPERTS, 2 * WIDTH, HIDDEN), random(EXPERTS, HIDDEN, WIDTH)
    (h,) = REFERENCE_BODIES["experts_up"](attrs, x, ids, up)
    (y,) = REFERENCE_BODIES["experts_down"](attrs, h, ids, weights, down)
    wanted = torch.zeros_like(x)
    for t in range(tokens):
        for j, expert in enumerate(ids[t].tolist()):
            if first <= expert < first + EXPERTS:
                gate, value = (up[expert - first] @ x[t]).chunk(2)
                wanted[t] += weights[t, j] * (down[expert - first] @ (F.silu(gate) * value))
    torch.testing.assert_close(y, wanted)


def test_a_program_is_bound_with_one_view_of_each_tensor(
    tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts have any length, and each new one is bound anew: that must not take long."""
    arenas = Arenas(tiny_plan.pool.arenas)
    memory = PlanMemory(tiny_plan, arenas, random_weights(tiny_plan, arenas))
    programs = BoundPrograms(memory, ReferenceBackend(tiny_plan))
    views = Mock(wraps=arenas.view)
    monkeypatch.setattr(arenas, "view", views)
    program = next(each for each in tiny_plan.pool.programs if each.phase == "prefill")
    programs.instructions(program, 5, 1)
    names = {name for step in program.steps for name in getattr(step, "args", ())}
    assert 0 < views.call_count <= len(names)
