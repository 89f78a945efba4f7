"""Metadata of the batch: many inputs have one shape, and only their names tell them apart."""

from __future__ import annotations

from tokenspeed_plan.plans.ops import BATCH_INPUTS, DRAFT_INPUTS, OPS
from tokenspeed_plan.plans.schema import Call, KernelSpec, Part, Program
from tokenspeed_plan.plans.validate.refusal import refuse

Producer = tuple[str, str]  # an operator, and its output


def check_batch(
    program: Program, step: Call, kernel: KernelSpec, producers: dict[str, Producer]
) -> None:
    """Each input role gets the batch's own buffer, or what a draft pass made for that role.

    Args:
        program: whose step it is.
        step: the call.
        kernel: what it calls.
        producers: for each buffer written so far the operator that wrote it; the outputs of this
            step are added.

    Raises:
        PlanError: an input of another role, or another number of queries a sequence.
    """
    args = step.places(kernel)
    inside: dict[str, Producer] = {}
    for part in kernel.parts:
        kind = part.kind
        op = OPS[kind]
        for role, operand in zip(op.operands, part.operands, strict=True):
            name = args.get(operand, operand)
            producer = inside.get(operand) or producers.get(name)
            fits = _fits_role(role, name, producer)
            if not fits:
                raise refuse(f"`{name}` is given to `{step.kernel}` as `{role}`")
            if kind == "draft_place" and role == "lens":
                _check_draft_start(program, name, producer)
        for role, output in zip(op.outputs, part.outputs, strict=False):
            inside[output] = (kind, role)
        _check_query_len(program, kernel, part)
    for local, producer in inside.items():
        if local in args:
            producers[args[local]] = producer


def _fits_role(role: str, name: str, producer: Producer | None) -> bool:
    if role not in BATCH_INPUTS or name == role:
        return True
    return producer in DRAFT_INPUTS.get(role, ())


def _check_draft_start(program: Program, name: str, producer: Producer | None) -> None:
    """Drafts go on after the context of a prefill, or after the tokens that were accepted."""
    after_prompt = program.phase == "prefill" and name == "context_lens"
    after_accepted = producer == ("accept", "lens")
    if not after_prompt and not after_accepted:
        raise refuse(f"drafts of {program.name} start after `{name}`")


def _check_query_len(program: Program, kernel: KernelSpec, part: Part) -> None:
    """Each part must count as many queries a sequence as its program has."""
    op = OPS[part.kind]
    constants = (*op.attrs, *op.optional)
    if "query_len" not in constants or program.phase != "decode":
        if "query_len" in part.attrs:
            raise refuse(f"`{kernel.name}` has a query_len outside of a decode step")
        return
    wanted = program.query_len
    if part.kind == "attention" and _is_by_seqs(kernel, part):
        wanted = 1  # a draft pass, with one token a sequence
    found = part.attrs.get("query_len", 1)
    if found != wanted:
        raise refuse(f"`{kernel.name}` has query_len {found}, its program has {wanted}")


def _is_by_seqs(kernel: KernelSpec, part: Part) -> bool:
    """Whether the first operand is a parameter with a row for each sequence."""
    first = part.operands[0]
    for param in kernel.tensors:
        if param.name == first:
            return param.tensor.shape[0] == "num_seqs"
    return False
