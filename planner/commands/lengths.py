"""`tokenspeed lengths`: how long the prompts and answers of a batch are, for a spec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.models.folder import find_folder
from tokenspeed_plan.planner.token_lengths import Lengths
from tokenspeed_plan.plans.errors import RequestError, SpecError
from tokenspeed_plan.plans.lengths_file import RowLengths

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.openai.conversion import Encoder

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class LengthsOptions:
    """The options of `tokenspeed lengths`."""

    batch: Path
    answers: Path | None
    model: str | None
    out: Path


@click.command("lengths")
@click.argument("batch", type=Folder)
@click.option("--answers", type=Folder, help="An output of these rows: how long answers were.")
@click.option(
    "--model", help="The folder of the model, whose tokenizer counts prompts without an answer."
)
@click.option("-o", "--out", type=Folder, required=True, help="The file, one row a line.")
def lengths_command(**options: Any) -> None:
    """Count the tokens of the rows of BATCH, for `first_turn_tokens: {lengths: FILE}` in a spec.

    An answer that is not known counts as the `max_tokens` of its row.
    """
    _lengths(LengthsOptions(**options))


def _lengths(options: LengthsOptions) -> None:
    from tokenspeed_plan.runtime.serving.batch.row_lengths import row_lengths

    if options.model is None and options.answers is None:
        raise RequestError(
            "nothing says how long prompts are",
            "name the folder of the model with --model, or an output of these rows with --answers",
        )
    tokenizer = None
    if options.model is not None:
        tokenizer = tokenizer_of(options.model)
    rows = list(row_lengths(options.batch, options.answers, tokenizer))
    if not rows:
        raise RequestError(
            f"`{options.batch}` has no rows whose length is known",
            "name the output of these rows, or the folder of the model",
        )
    lines = [json.dumps(row.as_json(), allow_nan=False) for row in rows]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in _summary(rows):
        click.echo(line, err=True)
    click.echo(f"wrote {options.out}: {len(rows)} sequences", err=True)


def _summary(rows: list[RowLengths]) -> Iterator[str]:
    """The distributions as a spec has them."""
    prompts = [row.prompt_tokens for row in rows]
    outputs = [row.output_tokens for row in rows if row.output_tokens is not None]
    for key, found in (("first_turn_tokens", prompts), ("output_tokens", outputs)):
        if found:
            each = Lengths.of(found)
            numbers = f"mean: {each.mean:g}, p95: {each.p95:g}, max: {each.longest}"
            yield f"{key}: {{{numbers}}}"


def tokenizer_of(model: str) -> Encoder:
    """The tokenizer of a model's folder, with its chat template.

    Raises:
        SpecError: there is no such folder.
    """
    from tokenspeed_plan.codegen.chat_template import ChatTemplate
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    folder = find_folder(model, None)
    if folder is None:
        raise SpecError(f"there is no folder `{model}`", "`--model` names a Hugging Face folder")
    return Tokenizer.load(folder, ChatTemplate.load(folder))
