"""Real parts that a whole run of the suite shares: started on first use, one of each, whatever the number of workers.

The process that owns the run (pytest itself, or the controller of pytest-xdist) starts and stops them. The workers of
pytest-xdist ask it for their addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from pathlib import Path
from tempfile import TemporaryDirectory

from cascade.local_parts import local_parts_dir
from streaming.kafka import local_broker
from streaming.kafka.local_broker import LocalBroker
from streaming.kafka.local_security import LocalSecurity, SecureListener
from tests.certificates import Authority, make_authority

PASSWORD = "c0rrectHorse"
SASL_LISTENERS = {
    "PLAIN": "PLAIN",
    "SCRAMA": "SCRAM-SHA-256",
    "SCRAMB": "SCRAM-SHA-512",
    "TOKEN": "OAUTHBEARER",
}


@dataclass(frozen=True)
class SharedBroker:
    """A broker of one node: `bootstrap` without, `secure_bootstrap` (by listener) with TLS and SASL.

    `authority` has signed the broker's certificate.
    """

    bootstrap: str
    secure_bootstrap: Mapping[str, str]
    authority: Authority


class SharedParts:
    """The parts of one run. Safe to call from several threads."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._broker: SharedBroker | None = None

    def close(self) -> None:
        """Stop what was started."""
        self._stack.close()

    def broker(self) -> SharedBroker:
        """The broker, started by the first call."""
        with self._lock:
            if self._broker is None:
                self._broker = self._start_broker()
            return self._broker

    def _start_broker(self) -> SharedBroker:
        parts = local_parts_dir()
        local_broker.install(parts, lambda _: None)
        directory = Path(self._stack.enter_context(TemporaryDirectory(prefix="cascade-tests-")))
        authority = make_authority(directory / "authority")
        certificate, key = authority.issue("broker", ["localhost"])
        listeners = {"TLS": SecureListener(), "MUTUAL": SecureListener(client_certificate=True)} | {
            name: SecureListener("SASL_SSL", mechanism)  # type: ignore[arg-type]
            for name, mechanism in SASL_LISTENERS.items()
        }
        security = LocalSecurity(listeners, certificate, key, authority.ca_file, users={"cascade": PASSWORD})
        broker = LocalBroker(directory / "broker", parts_dir=parts, security=security)
        self._stack.enter_context(broker)
        return SharedBroker(broker.bootstrap, {name: broker.secure_bootstrap(name) for name in listeners}, authority)


class _Manager(BaseManager):
    """Lends SharedParts to the workers of pytest-xdist."""


class PartsServer:
    """Answers the workers' questions in a thread of the process that owns `parts`."""

    def __init__(self, parts: SharedParts) -> None:
        _Manager.register("parts", callable=lambda: parts, exposed=["broker"])
        self._server = _Manager(address=("127.0.0.1", 0)).get_server()
        threading.Thread(target=self._server.serve_forever, name="shared parts", daemon=True).start()

    @property
    def address(self) -> tuple[str, int, bytes]:
        """Host, port and key for `connect`."""
        host, port = self._server.address
        return host, port, bytes(self._server.authkey)


def connect(address: tuple[str, int, bytes]) -> SharedParts:
    """The SharedParts behind the PartsServer at `address`."""
    host, port, key = address
    _Manager.register("parts")
    manager = _Manager(address=(host, port), authkey=key)
    manager.connect()
    parts: SharedParts = manager.parts()  # type: ignore[attr-defined]
    return parts
