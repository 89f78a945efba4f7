"""The files of examples/cluster: their own linters pass, and their commands are ours."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from conftest import ROOT

from tokenspeed_plan.planner.cli import main

FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
MANIFESTS = [FOLDER / "batch.yaml", FOLDER / "serve.yaml"]
KUBERNETES = "1.34"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def containers(path: Path) -> list[dict[str, Any]]:
    found = []
    for document in documents(path):
        template = document.get("spec", {}).get("template")
        if template:
            found += template["spec"]["containers"]
    return found


def options_of(words: list[str]) -> dict[str, Any]:
    """The options of a command of ours; click refuses a word that it does not know."""
    assert words[0] == "tokenspeed"
    command = main.commands[words[1]]
    return command.make_context(words[1], words[2:], parent=click.Context(main)).params


def commands() -> list[list[str]]:
    found = [
        container["command"] + container["args"] for p in MANIFESTS for container in containers(p)
    ]
    scripts = [path.read_text(encoding="utf-8") for path in SCRIPTS]
    scripts.append(documents(FOLDER / "batch.sky.yaml")[0]["run"])
    for script in scripts:
        text = script.replace("\\\n", " ")
        found += [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("exec ")]
    return found


def test_their_commands_are_ours() -> None:
    every = commands()
    assert len(every) == 4
    for words in every:
        params = options_of(words)
        if words[1] == "run":
            assert params["lease"] and params["shards"] == 200
        else:
            assert params["replicas"] == 4


def test_the_check_of_commands_can_fail() -> None:
    with pytest.raises(click.UsageError):
        options_of(["tokenspeed", "run", "plan", "--leases", "x"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", path], check=True)
    missing = subprocess.run([bash, path], env={"PATH": ""}, capture_output=True, text=True)
    assert missing.returncode != 0 and "the folder of a plan" in missing.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schema_of_kubernetes(path: Path) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        checker.validate(document, KUBERNETES, strict=True)


def test_a_server_gets_the_time_that_its_drain_takes() -> None:
    (server,) = containers(FOLDER / "serve.yaml")
    options = options_of(server["command"] + server["args"])
    pod = documents(FOLDER / "serve.yaml")[0]["spec"]["template"]["spec"]
    fleet = importlib.import_module("tokenspeed_plan.runtime.serving.router.fleet")
    needed_s = server["lifecycle"]["preStop"]["sleep"]["seconds"] + options["drain_s"] + fleet.END_S
    assert pod["terminationGracePeriodSeconds"] >= needed_s


def test_a_job_gives_up_where_the_exit_code_says_so() -> None:
    (job,) = documents(FOLDER / "batch.yaml")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    # Refused; all is done but rows have failed. 130, a shard that was given back, is tried again.
    assert codes == {2: "FailJob", 1: "FailIndex"}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_labels_of_a_service_are_those_of_its_pods() -> None:
    deployment, service = documents(FOLDER / "serve.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"].items() <= labels.items()
    ports = [port["name"] for port in containers(FOLDER / "serve.yaml")[0]["ports"]]
    assert all(port["targetPort"] in ports for port in service["spec"]["ports"])
