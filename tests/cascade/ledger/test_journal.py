"""The ledger on disk: what was written is what comes back, whatever is torn, deleted, full or taken."""

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
from tests.cascade.ledger.test_account import NOON, some_work

MINUTE = timedelta(minutes=1)


class Told:
    """A ledger whose account is as of `minute` minutes past noon."""

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


def journal_of(directory: Path, told: Told, **limits: Any) -> Journal:
    return Journal(directory, told.account, **{"file_bytes_max": 10**9, "files_max": 100} | limits)


def written(directory: Path, minutes: int = 5, **limits: Any) -> Told:
    told = Told()
    journal = journal_of(directory, told, **limits)
    for _ in range(minutes):
        told.work()
        journal.write()
    journal.close()
    return told


def the_file(directory: Path) -> Path:
    (file,) = directory.glob(f"*{SUFFIX}")
    return file


def counts(account: Account | None) -> Any:
    """What has to be equal to the bit, however the parts were put together."""
    assert account is not None
    return msgspec.json.decode(account.to_json())["counters"]


def test_what_was_written_is_what_comes_back(tmp_path: Path) -> None:
    told = written(tmp_path)
    (life,) = read_journal([tmp_path])
    assert len(life.accounts) == 6
    assert life.accounts[-1].to_json() == told.account().to_json()
    assert life.torn == 0


def test_the_parts_of_a_life_are_together_the_whole(tmp_path: Path) -> None:
    told = written(tmp_path)
    lives = read_journal([tmp_path])
    moments = [NOON + minute * MINUTE for minute in range(6)]
    parts = [merged_between(lives, *pair) for pair in itertools.pairwise(moments)]
    assert [part.counters.labels for part in parts if part] == [1, 2, 3, 4, 5]
    assert [part.started for part in parts if part] == moments[:-1]
    whole = merge_accounts([part for part in parts if part is not None])
    assert counts(whole) == counts(told.account())


def test_a_part_has_its_own_quantiles_and_a_maximum_within_a_bucket(tmp_path: Path) -> None:
    ledger = Told()
    journal = journal_of(tmp_path, ledger)
    for latency_s in (0.5, 0.001):
        ledger.minute += 1
        ledger.ledger.record_stage("features", latency_s, 0.0, 1_000)
        journal.write()
    journal.close()
    part = merged_between(read_journal([tmp_path]), NOON + MINUTE)
    assert part is not None
    histogram = part.counters.stages["features"]
    assert histogram.count == 1_000
    assert histogram.quantile(0.5) == pytest.approx(0.001, rel=0.01)
    assert histogram.max_s == pytest.approx(0.001, rel=0.02)


def test_several_lives_in_several_directories_merge(tmp_path: Path) -> None:
    parts = [written(tmp_path / name, minutes) for name, minutes in (("a", 2), ("b", 4))]
    parts.append(written(tmp_path / "a", 3))  # a restart
    lives = read_journal([tmp_path / "a", tmp_path / "b"])
    assert len(lives) == 3
    assert counts(merged_between(lives)) == counts(merge_accounts([part.account() for part in parts]))


def test_a_line_that_a_crash_cut_off_anywhere_is_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 2)
    file = the_file(tmp_path)
    content = file.read_bytes()
    (life,) = read_journal([tmp_path])
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for length in [*range(last, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:length])
        (torn,) = read_journal([tmp_path])
        assert [one.to_json() for one in torn.accounts] == [one.to_json() for one in life.accounts[:-1]]
        assert torn.torn == int(length > last)


@pytest.mark.parametrize("line", [b"", b"{}", b'{"format": 99}', b"\xff\xfe", b"[1]"])
def test_a_damaged_line_elsewhere_is_named(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, 2)
    file = the_file(tmp_path)
    first, _, rest = file.read_bytes().partition(b"\n")
    file.write_bytes(first + b"\n" + line + b"\n" + rest)
    with pytest.raises(DataError, match=f"{file.name}, line 2: "):
        read_journal([tmp_path])


def test_files_are_followed_by_others_and_the_newest_stay_and_the_total_with_them(tmp_path: Path) -> None:
    told = written(tmp_path, 9, file_bytes_max=1, files_max=3)
    files = sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}"))
    assert len(files) == 3
    assert files[-1].endswith(f"-000009{SUFFIX}")
    (life,) = read_journal([tmp_path])
    assert life.accounts[-1].to_json() == told.account().to_json()


def test_a_directory_is_one_services(tmp_path: Path) -> None:
    first = journal_of(tmp_path, Told())
    with pytest.raises(SettingError, match=r"ledger\.directory.*another service"):
        journal_of(tmp_path, Told())
    first.close()
    journal_of(tmp_path, Told()).close()


def test_a_directory_that_cannot_be_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingError, match=r"ledger\.directory"):
        journal_of(tmp_path / "file" / "below", Told())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A fault: while it holds True, a line does not get to the disk."""
    full = [False]
    sync = os.fsync

    def fsync(number: int) -> None:
        if full[0]:
            os.ftruncate(number, os.fstat(number).st_size - 10)
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr("cascade.ledger.journal.os.fsync", fsync)
    return full


def test_a_full_disk_costs_lines_and_the_next_one_makes_up_for_them(tmp_path: Path, full_disk: list[bool]) -> None:
    told = Told()
    journal = journal_of(tmp_path, told)
    journal.write()
    for full in (True, True, False):
        full_disk[0] = full
        told.work()
        if full:
            with pytest.raises(OSError, match="No space"):
                journal.write()
        else:
            journal.write()
    journal.close()
    (life,) = read_journal([tmp_path])
    assert life.torn == 2
    assert life.accounts[-1].to_json() == told.account().to_json()


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [(10.0, 25.0, 15.0), (None, 25.0, 25.0), (10.0, None, None), (None, None, None)],
)
def test_joules_of_a_part(before: float | None, after: float | None, joules: float | None) -> None:
    states = [
        MeterState.of("nvml", "measured", "counter", energy_j, None if energy_j is not None else "gone")
        for energy_j in (before, after)
    ]
    assert states[1].since(states[0]).energy_j == joules


def test_accounts_of_different_ledgers_have_no_difference() -> None:
    one, other = Told(), Told()
    other.started += MINUTE
    with pytest.raises(DataError, match="same ledger"):
        other.account().since(one.account())
    one.work()
    with pytest.raises(DataError):
        Told().account().since(one.account())


# --- the command ------------------------------------------------------------------------------------------------------


def run(capfdbinary: pytest.CaptureFixture[bytes], *arguments: object) -> tuple[int, bytes, bytes]:
    status = main(["ledger", *map(str, arguments)])
    out, err = capfdbinary.readouterr()
    return status, out, err


def test_merge_tells_all_and_a_time_a_part(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    told = written(tmp_path)
    status, out, _ = run(capfdbinary, "merge", tmp_path, "--json")
    assert status == 0
    summary = LedgerSummary.from_json_line(out)
    assert summary.transactions == told.account().counters.decisions
    assert summary.elapsed_s == 300.0
    _, out, _ = run(
        capfdbinary, "merge", tmp_path, "--json", "--from", "2026-01-01T12:02", "--until", "2026-01-01T14:03+02:00"
    )
    assert LedgerSummary.from_json_line(out).labels == 3
    status, out, _ = run(capfdbinary, "merge", tmp_path)
    assert status == 0
    assert b"6 lines of 1 life" in out


def test_intervals_are_told_one_by_one(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    told = written(tmp_path)
    status, out, _ = run(capfdbinary, "intervals", tmp_path, "--seconds", 120, "--json")
    assert status == 0
    summaries = [LedgerSummary.from_json_line(line) for line in out.splitlines()]
    assert [one.labels for one in summaries] == [1 + 2, 3 + 4, 5]
    assert sum(one.transactions for one in summaries) == told.account().counters.decisions
    status, out, _ = run(capfdbinary, "intervals", tmp_path, "--seconds", 120)
    assert status == 0
    assert out.count(b"01-01 12:0") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "{}", "--from", "noon"], b"--from noon: not a time"),
        (["merge", "{}", "--from", "2027-01-01"], b"no account between"),
        (["intervals", "{}", "--seconds", "1", "--until", "2027-01-01"], b"at most 10,000"),
        (["merge", "{}/empty"], b"no account in"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], arguments: list[str], said: bytes
) -> None:
    (tmp_path / "empty").mkdir()
    written(tmp_path)
    status, out, err = run(capfdbinary, *(one.format(tmp_path) for one in arguments))
    assert status == 1
    assert out == b""
    (line,) = err.splitlines()
    assert said in line


def test_a_life_begins_with_its_ledger_and_files_sort_by_time(tmp_path: Path) -> None:
    late, early = Told(), Told()
    late.started = datetime.fromisoformat("2026-03-01T00:00:00+00:00")
    for told in (late, early):
        journal_of(tmp_path, told).close()
    assert [life.accounts[0].started for life in read_journal([tmp_path])] == [NOON, late.started]
    assert [path.name[:8] for path in sorted(tmp_path.glob(f"*{SUFFIX}"))] == ["20260101", "20260301"]
