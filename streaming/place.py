"""A worker's place among several: its number, and the directory in which it tells its supervisor what that must know.

The supervisor writes the settings that it has checked, so that all workers have the same, at whatever time they start.
A worker writes the port of its health, and every second its ledger's account, so that of a killed one the ledger lacks
the last second only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cascade.config import Config
from cascade.errors import SettingError
from cascade.ledger import Account, EnergySampler, Ledger

REPORT_INTERVAL_S = 1.0
SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Of worker `number`; `directory` is shared by the workers of one supervisor and by nobody else."""

    number: int
    directory: Path

    def settings(self) -> Config:
        """The worker's own: a name that no other worker has, where there are names, and health for its supervisor.

        Transactional id and snapshots take their names from `kafka.instance`, or have new ones at each start. Raises
        SettingError where no supervisor wrote any.
        """
        path = self.directory / SETTINGS
        try:
            config = msgspec.json.decode(path.read_bytes(), type=Config)
        except (OSError, msgspec.MsgspecError) as error:
            raise SettingError(
                path, "file", None, f"no settings of a supervisor ({error})", "set worker.processes instead"
            ) from error
        instance = f"{config.kafka.instance}-{self.number}" if config.kafka.instance else ""
        return msgspec.structs.replace(
            config,
            kafka=msgspec.structs.replace(config.kafka, instance=instance),
            health=msgspec.structs.replace(config.health, enabled=True, host="127.0.0.1", port=0),
        )

    def clear(self) -> None:
        """Forget an earlier life of the worker."""
        for path in (self._port, self._account):
            path.unlink(missing_ok=True)

    def tell_port(self, port: int) -> None:
        """The worker: where its health is."""
        _replace(self._port, str(port).encode())

    def port(self) -> int | None:
        """The supervisor: where the worker's health is; None where it is not known yet."""
        try:
            return int(self._port.read_text())
        except (OSError, ValueError):
            return None

    @contextmanager
    def reporting(self, ledger: Ledger) -> Iterator[None]:
        """The worker: keep its account written, and its meters read, and write the last one at the end."""

        def report() -> None:
            # a full disk may cost the account, never the worker
            with suppress(OSError):
                _replace(self._account, ledger.account().to_json())

        try:
            with EnergySampler(report, REPORT_INTERVAL_S):
                yield
        finally:
            report()

    def account(self) -> Account | None:
        """The supervisor: the account that the worker wrote last, None where it wrote none; raises DataError."""
        try:
            line = self._account.read_bytes()
        except OSError:
            return None
        return Account.from_json(line)

    @property
    def _port(self) -> Path:
        return self.directory / f"{self.number}.port"

    @property
    def _account(self) -> Path:
        return self.directory / f"{self.number}.account.json"


def write_settings(directory: Path, config: Config) -> None:
    """The supervisor: the settings of all its workers. No secret is in them: they name where secrets are."""
    _replace(directory / SETTINGS, msgspec.json.encode(config))


def _replace(path: Path, content: bytes) -> None:
    """Write it as a whole or not at all: the reader may come at any time."""
    written = path.with_suffix(".new")
    written.write_bytes(content)
    written.replace(path)
