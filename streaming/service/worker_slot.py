"""The files through which a supervised worker and its supervisor exchange settings, port and account.

The supervisor writes the settings that it has checked, so that every worker starts with the same ones, whenever it
starts. A worker writes the port of its health server, and once a second its account: of a killed worker the ledger
loses at most the last second.
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

ACCOUNT_INTERVAL_S = 1.0
SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The slot of worker `number` (0 and up); a new process in the slot replaces one that ended.

    `directory`: shared by the workers of this supervisor, and by no other process.
    """

    number: int
    directory: Path

    def read_settings(self) -> Config:
        """Returns the supervisor's settings with this worker's own `kafka.instance` and health server.

        `kafka.instance`, which names the transactional id and the snapshots, gets the worker's number as a suffix; if
        it is empty, these names are new at each start. Raises SettingError if the supervisor wrote no settings.
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
        """Deletes the port and the account of a process that ended."""
        for path in (self._port, self._account):
            path.unlink(missing_ok=True)

    def write_port(self, port: int) -> None:
        """Writes the port of the worker's health server."""
        _replace(self._port, str(port).encode())

    def read_port(self) -> int | None:
        """Returns the port of the worker's health server; None if the worker has not written it yet."""
        try:
            return int(self._port.read_text())
        except (OSError, ValueError):
            return None

    @contextmanager
    def account_written(self, ledger: Ledger) -> Iterator[None]:
        """Reads the meters and writes the worker's account every second, and once more at the end."""

        def write() -> None:
            # a full disk may cost the account, never the worker
            with suppress(OSError):
                _replace(self._account, ledger.account().to_json())

        try:
            with EnergySampler(write, ACCOUNT_INTERVAL_S):
                yield
        finally:
            write()

    def read_account(self) -> Account | None:
        """Returns the account that the worker wrote last, None if it wrote none; raises DataError."""
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
    """Writes the settings of all workers. They contain no secret, only where secrets are."""
    _replace(directory / SETTINGS, msgspec.json.encode(config))


def _replace(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing: another process may read it at any time."""
    written = path.with_suffix(".new")
    written.write_bytes(content)
    written.replace(path)
