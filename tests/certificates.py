"""Certificates that a test makes for itself: an authority, and what it signs. Needs the `openssl` command."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Authority:
    """A certificate authority of its own; `ca_file` (PEM) is what trusts it."""

    directory: Path
    ca_file: Path
    _key_file: Path

    def issue(self, name: str, hosts: Sequence[str], organization: str = "") -> tuple[Path, Path]:
        """(certificate, key): PEM files, the key as unencrypted PKCS #8, for servers and clients alike.

        `name` is the common name, and names the files. `hosts`: host names and IP addresses that it certifies.
        `organization`: to Kubernetes, the group of the user `name`.
        """
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        alternatives = [f"subjectAltName={','.join(map(_alternative_name, hosts))}"] if hosts else []
        extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth", *alternatives]
        subject = f"/O={organization}/CN={name}" if organization else f"/CN={name}"
        _sign(subject, certificate, key, extensions, "-CA", str(self.ca_file), "-CAkey", str(self._key_file))
        return certificate, key


def make_authority(directory: Path) -> Authority:
    """A new authority with its files in `directory`, created if absent. Authorities do not trust each other."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "ca.pem", directory / "ca.key"
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
    _sign(f"/CN=Authority {directory.name}", certificate, key, extensions)
    return Authority(directory, certificate, key)


def _alternative_name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def _sign(subject: str, certificate: Path, key: Path, extensions: list[str], *signer: str) -> None:
    if shutil.which("openssl") is None:
        pytest.fail("the command openssl, which makes the certificates, is missing; install it")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate), "-subj", subject]
    added = [part for extension in extensions for part in ("-addext", extension)]
    # a configuration of the machine's own would add extensions of its own
    command = ["openssl", "req", "-x509", *new_key, *files, *signer, *added, "-config", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
