"""A plan is taken from those whose keys are allowed; OpenSSH itself is the oracle."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from click.testing import CliRunner

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan, save_plan, seal
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.signature import Signers, sign

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")


@dataclass(frozen=True)
class Signed:
    """A signed bundle, and keys beside it."""

    bundle: Path
    keys: Path
    allowed: Path

    def refuses(self, says: str, signers: Signers | None = None) -> None:
        with pytest.raises(PlanError, match=says) as caught:
            load_plan(self.bundle, signers or Signers(self.allowed))
        assert caught.value.hint


def make_key(folder: Path, name: str) -> str:
    """A line of allowed signers."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name]
    subprocess.run(command, check=True)
    kind, key, _ = (folder / f"{name}.pub").read_text().split()
    return f"{name}@example.org {kind} {key}\n"


def ask(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("signed")
    write_bundle(folder / "plan", checkpoint("dense"))
    lines = [make_key(folder, name) for name in ("anna", "ben", "eve")]
    (folder / "allowed").write_text("".join(lines[:2]))
    done = ask("sign", folder / "plan", "--key", folder / "anna")
    assert done.exit_code == 0, done.output
    return Signed(folder / "plan", folder, folder / "allowed")


@pytest.fixture
def signed(made: Signed, tmp_path: Path) -> Signed:
    shutil.copytree(made.bundle, tmp_path / "plan")
    return Signed(tmp_path / "plan", made.keys, made.allowed)


def test_openssh_verifies_the_signature_of_the_file(signed: Signed) -> None:
    load_plan(signed.bundle, Signers(signed.allowed))
    load_plan(signed.bundle, Signers(signed.allowed, "anna@example.org"))
    verify = ["ssh-keygen", "-Y", "verify", "-f", signed.allowed, "-I", "anna@example.org"]
    verify += ["-n", "tokenspeed-plan", "-s", signed.bundle / "plan.json.sig"]
    subprocess.run(verify, input=(signed.bundle / "plan.json").read_bytes(), check=True)


def test_a_plan_that_was_sealed_again_is_refused(signed: Signed) -> None:
    """It has the digest of its content, but its author is another."""
    plan = load_plan(signed.bundle)
    save_plan(seal(plan.model_copy(update={"compiler_version": "9"})), signed.bundle)
    load_plan(signed.bundle)
    signed.refuses("no signature of this plan by an allowed signer")


@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "cut", "of another plan"])
def test_a_bad_signature_is_refused(damage: str, signed: Signed) -> None:
    path = signed.bundle / "plan.json.sig"
    if damage == "gone":
        path.unlink()
        signed.refuses("has no signature")
        return
    data = path.read_bytes()
    texts = {"empty": b"", "garbage": b"\xff\0x", "cut": data[:-60]}
    texts["of another plan"] = sign(b"another plan", signed.keys / "anna")
    path.write_bytes(texts[damage])
    signed.refuses("no signature of this plan")


def test_signers_who_are_not_allowed_are_refused(signed: Signed, tmp_path: Path) -> None:
    signed.refuses("by `ben@example.org`", Signers(signed.allowed, "ben@example.org"))
    signed.refuses("by `-Y`", Signers(signed.allowed, "-Y"))
    signed.refuses("there is no file", Signers(tmp_path / "nothing"))
    (tmp_path / "empty").write_text("")
    signed.refuses("by an allowed signer", Signers(tmp_path / "empty"))
    assert ask("sign", signed.bundle, "--key", signed.keys / "eve").exit_code == 0
    signed.refuses("by an allowed signer")
    signed.refuses("by `anna@example.org`", Signers(signed.allowed, "anna@example.org"))


def test_a_signature_for_another_purpose_is_none(signed: Signed) -> None:
    path = signed.bundle / "plan.json"
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", signed.keys / "anna", "-n", "git", path]
    (signed.bundle / "plan.json.sig").unlink()
    subprocess.run(command, check=True, capture_output=True)
    signed.refuses("no signature of this plan")


@pytest.mark.parametrize(
    "command",
    [["check"], ["run", "--prompt", "x"], ["run", "--check"], ["serve", "--port", "0"], ["chat"]],
    ids=" ".join,
)
def test_commands_ask_for_a_signature(command: list[str], signed: Signed) -> None:
    """Before anything of the bundle is used."""
    first, *rest = command
    (signed.bundle / "plan.json.sig").unlink()
    done = ask(first, signed.bundle, *rest, "--require-signature", signed.allowed)
    assert done.exit_code == 2, done.output
    assert "has no signature" in done.output and done.output.count("error:") == 1
    done = ask(first, signed.bundle, *rest, "--signer", "anna@example.org")
    assert done.exit_code == 2 and "--require-signature FILE" in done.output


def test_a_batch_asks_for_a_signature(signed: Signed, tmp_path: Path) -> None:
    (signed.bundle / "plan.json.sig").unlink()
    (tmp_path / "in.jsonl").write_text("")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    done = ask("run", signed.bundle, *files, "--require-signature", signed.allowed)
    assert done.exit_code == 2 and "has no signature" in done.output
    assert not (tmp_path / "out.jsonl").exists()


def test_check_says_that_it_is_signed(signed: Signed) -> None:
    done = ask("check", signed.bundle, "--require-signature", signed.allowed)
    assert done.exit_code == 0 and "signature: one of" in done.output, done.output


def test_what_cannot_sign_is_said(signed: Signed, tmp_path: Path, monkeypatch: Any) -> None:
    for key in (tmp_path / "nothing", signed.allowed):
        done = ask("sign", signed.bundle, "--key", key)
        assert done.exit_code == 2 and "cannot sign" in done.output, done.output
    kernel = next((signed.bundle / "kernels").iterdir())
    kernel.write_text("altered")
    done = ask("sign", signed.bundle, "--key", signed.keys / "anna")
    assert done.exit_code == 2 and "is not the plan's" in done.output
    monkeypatch.setenv("PATH", str(tmp_path))
    signed.refuses("need `ssh-keygen`")
