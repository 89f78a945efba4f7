"""Who wrote a plan: signatures by OpenSSH's keys, made and verified by `ssh-keygen`.

A digest says that nothing was damaged; whoever changes a plan can seal it again. What is signed are
the bytes of plan.json, which hold the digests of everything else: kernels, binaries, the model's
files and its weights.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenspeed_plan.plans.errors import PlanError

NAMESPACE = "tokenspeed-plan"  # a signature for another purpose is none of a plan
SIGNATURE_FILE = "plan.json.sig"
_SIGN_HINT = "its author signs it with `tokenspeed sign DIR --key KEY`"


@dataclass(frozen=True, slots=True)
class Signers:
    """Whose signatures are taken.

    Attributes:
        allowed: a file of `ssh-keygen`'s format ALLOWED SIGNERS: lines such as `anna@example.org
            ssh-ed25519 AAAA...`.
        signer: the only one of them that counts; each does by default.
    """

    allowed: Path
    signer: str | None = None

    def check(self, folder: Path, data: bytes) -> str:
        """The signer of a plan whose text is `data`.

        Raises:
            PlanError: there is no signature, or it is not one of these signers' for this plan.
        """
        path = folder / SIGNATURE_FILE
        if not self.allowed.is_file():
            raise PlanError(f"there is no file `{self.allowed}`", "name a file of allowed signers")
        if not path.is_file():
            raise PlanError(f"`{folder}` has no signature `{SIGNATURE_FILE}`", _SIGN_HINT)
        with tempfile.NamedTemporaryFile(prefix="tokenspeed-") as copy:
            copy.write(path.read_bytes())  # what is asked about is what is verified
            copy.flush()
            return self._verified(path, Path(copy.name), data)

    def _verified(self, path: Path, copy: Path, data: bytes) -> str:
        names: list[str] = []
        if self.signer is not None:
            names = [self.signer]
        else:
            found = _ssh_keygen("find-principals", "-s", copy, "-f", self.allowed)
            names = found.stdout.decode(errors="replace").splitlines()
        for name in names:
            if self._is_by(name, copy, data):
                return name
        who = f"`{self.signer}`" if self.signer else "an allowed signer"
        raise PlanError(
            f"`{path}` is no signature of this plan by {who} of `{self.allowed}`", _SIGN_HINT
        )

    def _is_by(self, name: str, copy: Path, data: bytes) -> bool:
        command = ("verify", "-f", self.allowed, "-I", name, "-n", NAMESPACE, "-s", copy)
        return _ssh_keygen(*command, data=data).returncode == 0


def sign(data: bytes, key: Path) -> bytes:
    """The signature of a plan whose text is `data`; asks for the key's passphrase if it has one.

    Raises:
        PlanError: the key cannot sign.
    """
    done = _ssh_keygen("sign", "-f", key, "-n", NAMESPACE, data=data)
    if done.returncode != 0 or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = ", ".join(lines[-1:]) or "no reason given"
        raise PlanError(
            f"`{key}` cannot sign: {reason}", "name a private key of `ssh-keygen -t ed25519`"
        )
    return done.stdout


def _ssh_keygen(
    action: str, *options: str | Path, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = ["ssh-keygen", "-Y", action, *map(str, options)]
    try:
        return subprocess.run(command, input=data, capture_output=True, check=False)
    except OSError as error:
        raise PlanError(
            "signatures need `ssh-keygen`, which is not here", "install OpenSSH 8.2 or later"
        ) from error
