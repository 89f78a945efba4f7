"""Plans that somebody prepared: whatever they hold, they are read, or refused in our words."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_edits import with_program

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands.show import _page
from tokenspeed_plan.plans.bundle import (
    check_cubins,
    check_digest,
    check_sources,
    dump_plan,
    load_plan,
    parse_plan,
    save_plan,
    seal,
)
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.report import as_dict, as_text, why
from tokenspeed_plan.plans.schema import Binary, Decision, Plan
from tokenspeed_plan.plans.validate import validate

pytestmark = pytest.mark.slow  # whole processes, or many examples

FUZZ = float(os.environ.get("TOKENSPEED_FUZZ", "1"))  # a multiple of the examples
Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def bundle(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plan with its kernels, and a made-up binary."""
    folder = tmp_path_factory.mktemp("hostile") / "plan"
    plan = write_bundle(folder, checkpoint("dense"))
    texts = {path.stem: path.read_text() for path in (folder / "kernels").iterdir()}
    facts = {"registers": 1, "spill_bytes": 0, "shared_bytes": 0}
    binaries, cubins = [], {}
    for name in texts:
        cubins[f"{name}.sm90.cubin"] = f"cubin of {name}".encode()
        digest = sha256(cubins[f"{name}.sm90.cubin"])
        binaries.append(Binary(kernel=name, sm=90, cubin_sha256=digest, **facts))
    plan = seal(plan.model_copy(update={"binaries": tuple(binaries)}))
    plan = plan.model_copy(update={"target": plan.target.model_copy(update={"sm": 90})})
    save_plan(seal(plan), folder, texts, cubins)
    return folder


def leaves(item: Any, path: Path_ = ()) -> Iterator[Path_]:
    if path:
        yield path
    if isinstance(item, dict):
        for key in sorted(item):
            yield from leaves(item[key], (*path, key))
    elif isinstance(item, list):
        for index, one in enumerate(item):
            yield from leaves(one, (*path, index))


def by_field(fields: Any) -> list[list[Path_]]:
    """The places in a plan, those of one field together, so that rare fields get their share."""
    groups: dict[Path_, list[Path_]] = defaultdict(list)
    for path in leaves(fields):
        groups[tuple("*" if isinstance(step, int) else step for step in path)].append(path)
    return list(groups.values())


NUMBERS = [0, -1, 1, 3, 1 << 31, (1 << 63) - 1, -(1 << 63), 10**30]
NUMBERS += [0.0, -0.5, 1e300, float("nan"), float("inf"), float("-inf")]  # type: ignore[list-item]
TEXTS = ["", "x", "\x1b[2J", "../x", "/etc/passwd", "\ud800", "a" * 5000]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, None, True, [], {}, [[]], [0], {"x": 1}])
EDITS = st.sampled_from(["set", "set", "set", "drop", "double", "more", "extra"])


def edit(fields: Any, path: Path_, how: str, value: Any) -> None:
    """Change one place of a plan; nothing where the edit makes no sense there."""
    *above, last = path
    place = reduce(lambda item, step: item[step], above, fields)
    was = place[last]
    if how == "drop":
        del place[last]
    elif how == "double" and isinstance(place, list):
        place.insert(0, was)
    elif how == "extra" and isinstance(place, dict):
        place["more \x1b"] = value
    elif how == "more" and isinstance(was, int):
        place[last] = was * 2 + 1
    else:
        place[last] = value


def resealed(fields: Any) -> str:
    """The text of a plan with the digest that it then has, by other code than ours."""
    rest = {name: value for name, value in fields.items() if name != "digest"}
    fields["digest"] = sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")))
    return json.dumps(fields)


def use(plan: Plan, old: Plan) -> None:
    """All that reads a plan without running it."""
    shown = [as_text(plan, kernels=True), *map(str, diff(old, plan))]
    shown += [why(plan, decision.name) for decision in plan.decisions]
    shown += [why(plan, name) for name in plan.predicted.values]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(shown))
    "".join(shown).encode()
    json.dumps(as_dict(plan), allow_nan=False)
    _page(plan).encode()


@settings(max_examples=int(20 * FUZZ), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_and_resealed_plan_is_read_or_refused(
    data: st.DataObject, tiny_plan: Plan
) -> None:
    text = dump_plan(tiny_plan)
    fields = json.loads(text)
    field = data.draw(st.sampled_from(by_field(fields)))
    edit(fields, data.draw(st.sampled_from(field)), data.draw(EDITS), data.draw(VALUES))
    try:
        plan = parse_plan(resealed(fields), "plan")
        validate(plan)
        check_digest(plan.model_dump(mode="json"))
    except PlanError as error:
        assert error.hint
    else:
        use(plan, tiny_plan)


@settings(max_examples=int(15 * FUZZ), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_each_flipped_byte_of_a_bundle_is_refused(data: st.DataObject, bundle: Path) -> None:
    """Also those of blanks in plan.json, and of line ends in kernels."""
    path = data.draw(st.sampled_from(sorted(one for one in bundle.rglob("*") if one.is_file())))
    was = path.read_bytes()
    at = data.draw(st.integers(0, len(was) - 1))
    flipped = bytearray(was)
    flipped[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    try:
        with pytest.raises(PlanError) as caught:
            plan = load_plan(bundle)
            check_sources(plan, bundle)
            check_cubins(plan, bundle)
        assert caught.value.hint
    finally:
        path.write_bytes(was)


@pytest.mark.parametrize(("old", "new"), [("\n", "\n\n"), (" ", "\t"), ('": ', '":')])
def test_a_plan_spelled_otherwise_is_refused(
    old: str, new: str, bundle: Path, tmp_path: Path
) -> None:
    text = (bundle / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text)
    assert load_plan(tmp_path) is load_plan(tmp_path), "checked once"
    (tmp_path / "plan.json").write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError, match="was altered after planning"):
        load_plan(tmp_path)


def test_other_line_ends_are_another_kernel(bundle: Path, tmp_path: Path) -> None:
    """Python reads a carriage return as a line feed, unless it is told not to."""
    plan = load_plan(bundle)
    (tmp_path / "kernels").mkdir()
    for path in (bundle / "kernels").iterdir():
        (tmp_path / "kernels" / path.name).write_bytes(path.read_bytes())
    assert check_sources(plan, tmp_path) == len(plan.kernels)
    path = tmp_path / "kernels" / path.name
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    with pytest.raises(PlanError, match="is not the plan's"):
        check_sources(plan, tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 30])
@pytest.mark.parametrize(
    "where",
    [("predicted", "decode_batch"), ("spec", "workload", "concurrency"), ("model", "num_layers")],
)
def test_a_number_that_only_python_knows_is_refused(
    where: Path_, number: str, tiny_plan: Plan
) -> None:
    fields = json.loads(dump_plan(tiny_plan))
    *above, last = where
    reduce(lambda item, step: item[step], above, fields)[last] = "HERE"
    with pytest.raises(PlanError):
        parse_plan(json.dumps(fields).replace('"HERE"', number), "plan")


def test_the_schema_knows_finite_numbers_only(tiny_plan: Plan) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            type(tiny_plan.predicted).model_validate(
                tiny_plan.predicted.model_dump() | {"decode_batch": bad}
            )
        with pytest.raises(ValueError, match="JSON compliant"):
            Plan.model_validate(tiny_plan.model_copy(update={"spec": {"a": [bad]}}).model_dump())


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../config.json", "a/../../b", "a//b", ".", "", "./a", "a\nb", "\x1b"]
)
def test_a_file_elsewhere_is_refused(name: str, tiny_plan: Plan) -> None:
    model = tiny_plan.model.model_copy(update={"files": {name: "0" * 64}})
    with pytest.raises(PlanError, match="is no file in the model's folder"):
        validate(tiny_plan.model_copy(update={"model": model}))


@pytest.mark.parametrize("names", [{}, {"ttft_ms"}, {"tpot_ms"}])
@pytest.mark.parametrize("column", ["values", "low", "high"])
def test_promises_have_intervals(column: str, names: set[str], tiny_plan: Plan) -> None:
    predicted = tiny_plan.predicted
    left = {k: v for k, v in getattr(predicted, column).items() if k not in names and names}
    changed = predicted.model_copy(update={column: left})
    with pytest.raises(PlanError, match="interval"):
        validate(tiny_plan.model_copy(update={"predicted": changed}))


def test_a_decode_step_takes_time(tiny_plan: Plan) -> None:
    changed = tiny_plan.predicted.model_copy(update={"decode_step_us": {"host": 0.0}})
    with pytest.raises(PlanError, match="to take no time"):
        validate(tiny_plan.model_copy(update={"predicted": changed}))
    nothing = tiny_plan.predicted.model_copy(update={"values": {}, "low": {}, "high": {}})
    with pytest.raises(PlanError, match="predicts no `cache_hit_rate`"):
        validate(tiny_plan.model_copy(update={"predicted": nothing}))
    free = with_program(tiny_plan, -1, predicted_us=0.0)
    validate(free)
    use(seal(free), tiny_plan)


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\x08"


def test_no_escape_sequence_reaches_the_terminal(
    bundle: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    plan = load_plan(bundle)
    decision = Decision(name="rollback" + ESCAPES, value=ESCAPES, reason=ESCAPES, runner_up=ESCAPES)
    dressed = {
        "model": plan.model.model_copy(update={"name": ESCAPES}),
        "target": plan.target.model_copy(update={"gpu": ESCAPES}),
        "compiler_version": ESCAPES,
        "spec": plan.spec | {ESCAPES: ESCAPES},
        "decisions": (decision, *plan.decisions),
    }
    save_plan(seal(plan.model_copy(update=dressed)), tmp_path / "plan")
    folder = str(tmp_path / "plan")
    for command in (
        ["show", folder],
        ["show", folder, "--kernels"],
        ["show", folder, "--json"],
        ["show", folder, "--why", decision.name],
        ["diff", str(bundle), folder],
        ["diff", folder, str(bundle)],
    ):
        done = CliRunner().invoke(main, command)
        assert isinstance(done.exception, SystemExit | None), command
        assert "owned" in done.output, command
        assert not set("\x1b\x07\x9b\u202e\r\x08") & set(done.output), command


def test_nothing_outside_the_folder_is_written_or_deleted(bundle: Path, tmp_path: Path) -> None:
    """Neither through links, nor by names in the plan that is replaced."""
    plan = load_plan(bundle)
    name = plan.kernels[0].name
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in (f"{name}.py", "main.py", "a.sm1.cubin"):
        (mine / file).write_text("my own")
    out = tmp_path / "out"
    out.mkdir()
    planted = {"kernels": [{"name": "main"}, {"name": "../mine/main"}, {"name": name}]}
    planted["binaries"] = [{"kernel": "a", "sm": 1}, {"kernel": "../../mine/a", "sm": 1}]
    (out / "plan.json").write_text(json.dumps(planted))
    for inner in ("kernels", "cubin"):
        (out / inner).symlink_to(mine)
        with pytest.raises(PlanError, match="is a link"):
            save_plan(plan, out, {name: "x"}, {f"{name}.sm90.cubin": b"x"})
        (out / inner).unlink()
    (out / "kernels").mkdir()
    (out / "kernels/main.py").write_text("my own")
    (out / f"kernels/{name}.py").symlink_to(mine / f"{name}.py")
    (out / f".plan.json.{os.getpid()}").symlink_to(mine / "main.py")
    save_plan(plan, out)
    assert {path.read_text() for path in mine.iterdir()} == {"my own"}
    assert [path.name for path in (out / "kernels").iterdir()] == ["main.py"]
    assert load_plan(out) == plan and not (out / "plan.json").is_symlink()


def test_a_pipe_is_not_waited_for(tiny_plan: Plan, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="is a pipe"):
        load_plan(tmp_path)
    save_plan(tiny_plan, tmp_path)
    assert load_plan(tmp_path) == tiny_plan
