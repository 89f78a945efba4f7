"""A finished output that another plan wrote is not overwritten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputFile
from tokenspeed_plan.runtime.serving.batch.lines import KEY_PREFIX, parse_row
from tokenspeed_plan.runtime.serving.batch.resume import sidecar_path
from tokenspeed_plan.runtime.serving.batch.writers import read_whole_lines
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError

MAX_LOOKED_AT = 20  # answers of an output; a row that was edited has another key, too


def refuse_other_plan(source: Path, output: Path, plan_digest: str) -> None:
    """Refuse to replace a finished output of which no answer fits this plan.

    An output that is being resumed, and what is no regular file, is left to the run.

    Raises:
        RequestError: none of the first answers is this plan's answer to its row.
    """
    if not (source.is_file() and output.is_file()) or sidecar_path(output).exists():
        return
    keys = dict(islice(_answers(output), MAX_LOOKED_AT))
    if not keys:
        return
    num_found = 0
    with InputFile(source) as rows:
        for line in rows.lines():
            with suppress(InvalidRequestError):
                row = parse_row(line.raw, line.number, plan_digest)
                if keys.get(row.custom_id) == row.key:
                    return
                num_found += row.custom_id in keys
            if num_found == len(keys):
                break
    if num_found:
        raise RequestError(
            f"`{output}` holds the finished answers of another plan, or to other rows",
            "name another output, or delete it",
        )


def _answers(output: Path) -> Iterator[tuple[str, str]]:
    """The `custom_id` and the key of each answer."""
    with suppress(OSError, ValueError):
        for line in read_whole_lines(output):
            data = json.loads(line)
            if not isinstance(data, dict) or not isinstance(data.get("response"), dict):
                continue
            custom_id, key = data.get("custom_id"), data.get("id")
            if isinstance(custom_id, str) and str(key).startswith(KEY_PREFIX):
                yield custom_id, str(key)
