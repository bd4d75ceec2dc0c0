"""What a supervised worker reports to its supervisor every second: its health, its metrics and its account.

The reports are in memory that both share: of a killed worker the ledger loses at most the last second. The settings,
which the supervisor has checked, are in the worker's environment, so that every worker starts with the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar, Sample

from cascade.config import Config
from cascade.errors import DataError, SettingError
from cascade.ledger import Account, EnergySampler, Ledger
from streaming.health_state import ComponentStatus, HealthState
from streaming.service.worker_memory import WorkerMemory

REPORT_INTERVAL_S = 1.0
SETTINGS_VARIABLE = "CASCADE_WORKER_SETTINGS"
# Name, help, type and samples.
_Family = tuple[str, str, str, list[Any]]


class _Report(msgspec.Struct, frozen=True):
    """not_alive: the reasons to restart the worker. components: status and text by name. account: its `to_json`."""

    not_alive: list[str]
    components: dict[str, tuple[ComponentStatus, str]]
    families: list[_Family]
    account: bytes


def encode_report(ledger: Ledger, registry: CollectorRegistry, health: HealthState) -> bytes:
    """A worker's report, at this moment."""
    report = _Report(
        not_alive=health.not_alive(),
        components={name: (part.status, part.text) for name, part in health.components().items()},
        families=[(found.name, found.documentation, found.type, found.samples) for found in registry.collect()],
        account=ledger.account().to_json(),
    )
    return msgspec.msgpack.encode(report)


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The slot of worker `number` (0 and up), and its memory; a new process in the slot replaces one that ended.

    The worker reports, and the supervisor reads; there it raises DataError for a report of another release, which was
    installed meanwhile.
    """

    number: int
    memory: WorkerMemory

    # --- the worker's side ----------------------------------------------------------------------------------------

    @contextmanager
    def reported(self, ledger: Ledger, registry: CollectorRegistry, health: HealthState) -> Iterator[None]:
        """Reads the meters and reports now, every second, and once more at the end."""

        def report() -> None:
            self.memory.write(encode_report(ledger, registry, health))

        try:
            report()
            with EnergySampler(report, REPORT_INTERVAL_S):
                yield
        finally:
            report()

    # --- the supervisor's side ------------------------------------------------------------------------------------

    def show_health(self, name: str, health: HealthState) -> list[str]:
        """Copies the worker's health into `health`, as the component `name`; returns the reasons to restart it."""
        report = self._read()
        if report is None:
            health.waiting(name, "starting")
            return []
        waits = [f"{part}: {text or status}" for part, (status, text) in report.components.items() if status != "ok"]
        if report.not_alive:
            health.failed(name, "; ".join(report.not_alive))
        elif waits or not report.components:
            health.waiting(name, "; ".join(waits) or "starting")
        else:
            health.ok(name, "; ".join(f"{part}: {text}" for part, (_, text) in report.components.items() if text))
        return report.not_alive

    def metrics(self) -> list[Metric]:
        """The worker's metrics, at most a second old; none before its first report."""
        report = self._read()
        return [] if report is None else [_restored(family) for family in report.families]

    def account(self) -> Account | None:
        """The worker's account, at most a second old; None before its first report."""
        report = self._read()
        return None if report is None else Account.from_json(report.account)

    def _read(self) -> _Report | None:
        message = self.memory.read()
        try:
            return msgspec.msgpack.decode(message, type=_Report) if message else None
        except msgspec.MsgspecError as error:
            raise DataError(f"worker {self.number}: unreadable report ({error}); restart the service") from error


def _restored(family: _Family) -> Metric:
    *head, samples = family
    metric = Metric(*head)
    metric.samples = [
        Sample(name, labels, value, timestamp, exemplar and Exemplar(*exemplar))
        for name, labels, value, timestamp, exemplar, *_ in samples
    ]
    return metric


def settings_in(environment: Mapping[str, str], number: int) -> Config:
    """The supervisor's settings, with `kafka.instance` of worker `number` and without a health server.

    `kafka.instance`, which names the transactional id and the snapshots, gets the worker's number as a suffix; if it is
    empty, these names are new at each start. Raises SettingError if there are no settings of a supervisor.
    """
    try:
        config = msgspec.json.decode(environment[SETTINGS_VARIABLE], type=Config)
    except (KeyError, msgspec.MsgspecError) as error:
        problem = f"no settings of a supervisor ({type(error).__name__})"
        raise SettingError("environment", SETTINGS_VARIABLE, None, problem, "set worker.processes instead") from error
    instance = worker_instance(config.kafka.instance, number) if config.kafka.instance else ""
    return msgspec.structs.replace(
        config,
        kafka=msgspec.structs.replace(config.kafka, instance=instance),
        health=msgspec.structs.replace(config.health, enabled=False),
    )


def worker_instance(instance: str, number: int) -> str:
    """The `kafka.instance` of a supervised worker."""
    return f"{instance}-{number}"


def worker_environment(config: Config) -> dict[str, str]:
    """This process's environment with the settings of all workers. They contain no secret, only where secrets are."""
    return {**os.environ, SETTINGS_VARIABLE: msgspec.json.encode(config).decode()}
