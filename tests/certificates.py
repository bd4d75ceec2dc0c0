"""Certificates that a test makes for itself: an authority, and what it signs. Needs the `openssl` command."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_DAYS = "2"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


@dataclass(frozen=True)
class Authority:
    """A certificate authority of its own; `ca_file` (PEM) is what trusts it."""

    directory: Path
    ca_file: Path
    _key_file: Path

    def issue(self, name: str, hosts: Sequence[str]) -> tuple[Path, Path]:
        """(certificate, key): PEM files, the key as unencrypted PKCS #8, for servers and clients alike.

        `name` is the common name, and names the files. `hosts`: host names and IP addresses that it is good for.
        """
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        alternatives = [f"subjectAltName={','.join(map(_alternative_name, hosts))}"] if hosts else []
        extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth", *alternatives]
        _openssl(
            "req",
            "-x509",
            *_NEW_KEY,
            "-keyout",
            str(key),
            "-out",
            str(certificate),
            "-days",
            _DAYS,
            "-subj",
            f"/CN={name}",
            "-CA",
            str(self.ca_file),
            "-CAkey",
            str(self._key_file),
            *_added(extensions),
        )
        return certificate, key


def make_authority(directory: Path) -> Authority:
    """A new authority whose files lie in `directory`, which is made if need be; two of them trust not each other."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "ca.pem", directory / "ca.key"
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
    _openssl(
        "req",
        "-x509",
        *_NEW_KEY,
        "-keyout",
        str(key),
        "-out",
        str(certificate),
        "-days",
        _DAYS,
        "-subj",
        f"/CN=Authority {directory.name}",
        *_added(extensions),
    )
    return Authority(directory, certificate, key)


def _added(extensions: list[str]) -> list[str]:
    return [part for extension in extensions for part in ("-addext", extension)]


def _alternative_name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def _openssl(*arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.fail("the command openssl, which makes the certificates, is missing; install it")
    # a configuration of the machine's own would add extensions of its own
    command = ["openssl", *arguments, "-config", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
