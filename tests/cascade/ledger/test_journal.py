"""The ledger on disk: reading returns what was written, also after torn lines, deleted files and a full disk."""

from __future__ import annotations

import itertools
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cascade.cli import main
from cascade.errors import DataError, SettingError
from cascade.ledger import Account, Journal, Ledger, LedgerSummary, merge_accounts, merged_between, read_journal
from cascade.ledger.account import MeterState
from cascade.ledger.journal import SUFFIX
from tests.cascade.ledger.helpers import NOON
from tests.cascade.ledger.test_account import some_work

MINUTE = timedelta(minutes=1)


class Service:
    """A service whose ledger is at `minute` minutes past noon."""

    def __init__(self, seed: int = 0) -> None:
        self.ledger = Ledger(watts_per_core=8.0, bundle_version="b-1", screener="walk")
        self.minute, self.seed = 0, seed
        self.started = NOON

    def work(self) -> None:
        self.minute += 1
        self.seed += 1
        some_work(self.seed)(self.ledger)

    def account(self) -> Account:
        return msgspec.structs.replace(
            self.ledger.account(), started=self.started, ended=self.started + self.minute * MINUTE
        )


def journal_of(directory: Path, service: Service, **limits: Any) -> Journal:
    return Journal(directory, service.account, **{"file_bytes_max": 10**9, "files_max": 100} | limits)


def written(directory: Path, minutes: int = 5, **limits: Any) -> Service:
    service = Service()
    journal = journal_of(directory, service, **limits)
    for _ in range(minutes):
        service.work()
        journal.write()
    journal.close()
    return service


def the_file(directory: Path) -> Path:
    (file,) = directory.glob(f"*{SUFFIX}")
    return file


def counts(account: Account | None) -> Any:
    """The counts, which must be equal to the bit however the parts were merged."""
    assert account is not None
    return msgspec.json.decode(account.to_json())["counters"]


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    service = written(tmp_path)
    (run,) = read_journal([tmp_path])
    assert len(run.accounts) == 6
    assert run.accounts[-1].to_json() == service.account().to_json()
    assert run.torn == 0


def test_the_parts_of_a_run_add_up_to_the_whole(tmp_path: Path) -> None:
    service = written(tmp_path)
    runs = read_journal([tmp_path])
    moments = [NOON + minute * MINUTE for minute in range(6)]
    parts = [merged_between(runs, *pair) for pair in itertools.pairwise(moments)]
    assert [part.counters.labels for part in parts if part] == [1, 2, 3, 4, 5]
    assert [part.started for part in parts if part] == moments[:-1]
    whole = merge_accounts([part for part in parts if part is not None])
    assert counts(whole) == counts(service.account())


def test_a_part_has_its_own_quantiles_and_a_maximum_within_a_bucket(tmp_path: Path) -> None:
    service = Service()
    journal = journal_of(tmp_path, service)
    for latency_s in (0.5, 0.001):
        service.minute += 1
        service.ledger.record_stage("features", latency_s, 0.0, 1_000)
        journal.write()
    journal.close()
    part = merged_between(read_journal([tmp_path]), NOON + MINUTE)
    assert part is not None
    histogram = part.counters.stages["features"]
    assert histogram.count == 1_000
    assert histogram.quantile(0.5) == pytest.approx(0.001, rel=0.01)
    assert histogram.max_s == pytest.approx(0.001, rel=0.02)


def test_several_runs_in_several_directories_merge(tmp_path: Path) -> None:
    parts = [written(tmp_path / name, minutes) for name, minutes in (("a", 2), ("b", 4))]
    parts.append(written(tmp_path / "a", 3))  # a restart
    runs = read_journal([tmp_path / "a", tmp_path / "b"])
    assert len(runs) == 3
    assert counts(merged_between(runs)) == counts(merge_accounts([part.account() for part in parts]))


def test_a_line_that_a_crash_cut_off_at_any_byte_is_skipped(tmp_path: Path) -> None:
    written(tmp_path, 2)
    file = the_file(tmp_path)
    content = file.read_bytes()
    (run,) = read_journal([tmp_path])
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for length in [*range(last, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:length])
        (torn,) = read_journal([tmp_path])
        assert [account.to_json() for account in torn.accounts] == [account.to_json() for account in run.accounts[:-1]]
        assert torn.torn == int(length > last)


@pytest.mark.parametrize("line", [b"", b"{}", b'{"format": 99}', b"\xff\xfe", b"[1]"])
def test_any_other_damaged_line_is_an_error_with_its_number(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, 2)
    file = the_file(tmp_path)
    first, _, rest = file.read_bytes().partition(b"\n")
    file.write_bytes(first + b"\n" + line + b"\n" + rest)
    with pytest.raises(DataError, match=f"{file.name}, line 2: "):
        read_journal([tmp_path])


def test_only_the_newest_files_remain_and_the_total_is_complete(tmp_path: Path) -> None:
    service = written(tmp_path, 9, file_bytes_max=1, files_max=3)
    files = sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}"))
    assert len(files) == 3
    assert files[-1].endswith(f"-000009{SUFFIX}")
    (run,) = read_journal([tmp_path])
    assert run.accounts[-1].to_json() == service.account().to_json()


def test_only_one_service_writes_to_a_directory_and_it_must_be_possible(tmp_path: Path) -> None:
    first = journal_of(tmp_path, Service())
    with pytest.raises(SettingError, match=r"ledger\.directory.*another service"):
        journal_of(tmp_path, Service())
    first.close()
    journal_of(tmp_path, Service()).close()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingError, match=r"ledger\.directory"):
        journal_of(tmp_path / "file" / "below", Service())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A fault: while its value is True, no line is written completely."""
    full = [False]
    sync = os.fsync

    def fsync(number: int) -> None:
        if full[0]:
            os.ftruncate(number, os.fstat(number).st_size - 10)
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr("cascade.ledger.journal.os.fsync", fsync)
    return full


def test_the_next_line_makes_up_for_lines_that_a_full_disk_lost(tmp_path: Path, full_disk: list[bool]) -> None:
    service = Service()
    journal = journal_of(tmp_path, service)
    journal.write()
    full_disk[0] = True
    for _ in range(2):
        service.work()
        with pytest.raises(OSError, match="No space"):
            journal.write()
    full_disk[0] = False
    service.work()
    journal.close()
    (run,) = read_journal([tmp_path])
    assert run.torn == 2
    assert run.accounts[-1].to_json() == service.account().to_json()


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [(10.0, 25.0, 15.0), (None, 25.0, 25.0), (10.0, None, None), (None, None, None)],
)
def test_joules_of_a_part(before: float | None, after: float | None, joules: float | None) -> None:
    states = [
        MeterState("nvml", "measured", ("counter",), energy_j, None if energy_j is not None else "gone")
        for energy_j in (before, after)
    ]
    assert states[1].since(states[0]).energy_j == joules


def test_accounts_of_different_ledgers_have_no_difference() -> None:
    first, second = Service(), Service()
    second.started += MINUTE
    with pytest.raises(DataError, match="same ledger"):
        second.account().since(first.account())
    first.work()
    with pytest.raises(DataError):
        Service().account().since(first.account())


# --- the command ------------------------------------------------------------------------------------------------------


def run(capfdbinary: pytest.CaptureFixture[bytes], *arguments: object) -> tuple[int, bytes, bytes]:
    status = main(["ledger", *map(str, arguments)])
    out, err = capfdbinary.readouterr()
    return status, out, err


def test_merge_prints_the_whole_journal_or_a_period(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    service = written(tmp_path)
    status, out, _ = run(capfdbinary, "merge", tmp_path, "--json")
    assert status == 0
    summary = LedgerSummary.from_json_line(out)
    assert summary.transactions == service.account().counters.decisions
    assert summary.elapsed_s == 300.0
    _, out, _ = run(
        capfdbinary, "merge", tmp_path, "--json", "--from", "2026-01-01T12:02", "--until", "2026-01-01T14:03+02:00"
    )
    assert LedgerSummary.from_json_line(out).labels == 3
    status, out, _ = run(capfdbinary, "merge", tmp_path)
    assert status == 0
    assert b"6 journal lines from 1 run" in out


def test_intervals_prints_one_row_per_interval(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    service = written(tmp_path)
    status, out, _ = run(capfdbinary, "intervals", tmp_path, "--seconds", 120, "--json")
    assert status == 0
    summaries = [LedgerSummary.from_json_line(line) for line in out.splitlines()]
    assert [summary.labels for summary in summaries] == [1 + 2, 3 + 4, 5]
    assert sum(summary.transactions for summary in summaries) == service.account().counters.decisions
    status, out, _ = run(capfdbinary, "intervals", tmp_path, "--seconds", 120)
    assert status == 0
    assert out.count(b"01-01 12:0") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "{}", "--from", "noon"], b"--from noon: not a time"),
        (["merge", "{}", "--from", "2027-01-01"], b"no account between"),
        (["intervals", "{}", "--seconds", "1", "--until", "2027-01-01"], b"the maximum is 10,000"),
        (["merge", "{}/empty"], b"no account in"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], arguments: list[str], message: bytes
) -> None:
    (tmp_path / "empty").mkdir()
    written(tmp_path)
    status, out, err = run(capfdbinary, *(argument.format(tmp_path) for argument in arguments))
    assert status == 1
    assert out == b""
    (line,) = err.splitlines()
    assert message in line


def test_a_run_begins_with_its_ledger_and_files_sort_by_time(tmp_path: Path) -> None:
    late, early = Service(), Service()
    late.started = datetime.fromisoformat("2026-03-01T00:00:00+00:00")
    for service in (late, early):
        journal_of(tmp_path, service).close()
    assert [run.accounts[0].started for run in read_journal([tmp_path])] == [NOON, late.started]
    assert [path.name[:8] for path in sorted(tmp_path.glob(f"*{SUFFIX}"))] == ["20260101", "20260301"]
