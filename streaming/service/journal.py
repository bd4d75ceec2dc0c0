"""Writes the ledger's journal; a disk error never ends the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from cascade.config import LedgerSettings
from cascade.ledger import Account, EnergySampler, Journal

log = structlog.get_logger()


@contextmanager
def journal_written(settings: LedgerSettings, account: Callable[[], Account]) -> Iterator[None]:
    """Writes a line every `interval_s`, and the last one at the end; raises SettingError as Journal does.

    A full disk loses lines, and the log has a warning. The next line contains their figures.
    """
    if not settings.directory:
        yield
        return
    directory = Path(settings.directory)
    journal = Journal(directory, account, int(settings.file_mb_max * 1e6), settings.files_max)

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            log.error("the ledger was not written", directory=str(directory), reason=error.strerror or str(error))

    try:
        with EnergySampler(lambda: attempt(journal.write), settings.interval_s):
            yield
    finally:
        attempt(journal.close)
