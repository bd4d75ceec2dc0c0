"""The supervisor of several workers, on stand-ins for their processes: who is restarted, stopped, killed, given up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry

from cascade.config import Config, KafkaSettings, WorkerSettings
from cascade.errors import DataError, SettingError, WorkerEndedError
from cascade.ledger import Ledger
from cascade.local_parts import OwnedProcess
from streaming.health_state import HealthState
from streaming.service import supervisor
from streaming.service.supervisor import SupervisedWorker, run_workers
from streaming.service.waiting import Stopping
from streaming.service.worker_memory import MESSAGE_BYTES_MAX, WorkerMemory
from streaming.service.worker_report import (
    SETTINGS_VARIABLE,
    WorkerSlot,
    encode_report,
    settings_in,
    worker_environment,
)
from tests.timing import SetClock, wait_until

# as they are, before `hurry`
PAUSE_S_FIRST, PAUSE_S_SECOND = supervisor.PAUSE_S_FIRST, supervisor.PAUSE_S_SECOND
# Writes how many signals it received, and then stops.
WILLING = """
import signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
open(sys.argv[1] + "/up", "a").write("x")
while not received:
    time.sleep(0.01)
time.sleep(0.3)
open(sys.argv[1] + "/received", "w").write(str(len(received)))
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + "/up", "a").write("x")
time.sleep(60)
"""
# Reports as a worker does; alive, but for the report in the file `hangs` while that is there.
REPORTING = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from streaming.service.worker_memory import WorkerMemory
directory, memory, alive = sys.argv[1], WorkerMemory(int(sys.argv[2])), bytes.fromhex(sys.argv[3])
open(directory + "/up", "a").write("x")
while True:
    hangs = directory + "/hangs"
    memory.write(open(hangs, "rb").read() if os.path.exists(hangs) else alive)
    time.sleep(0.05)
"""
BROKEN = "import sys; open(sys.argv[1] + '/up', 'a').write('x'); sys.exit(3)"


def report(not_alive: str = "") -> bytes:
    health = HealthState(30.0)
    health.ok("partitions")
    if not_alive:
        health.failed(*not_alive.split(": "))
    return encode_report(Ledger(), CollectorRegistry(), health)


class Run:
    """`run_workers` in a thread."""

    def __init__(self, directory: Path, programs: list[str], drain_s: float = 5.0, stall_s_max: float = 30.0) -> None:
        self.health, self.stopping = HealthState(stall_s_max), Stopping()
        self.error: BaseException | None = None
        self.directories = [directory / str(number) for number in range(len(programs))]
        for path in self.directories:
            path.mkdir()
        slots = [WorkerSlot(number, WorkerMemory.create()) for number in range(len(programs))]
        self.workers = [
            SupervisedWorker(
                slot,
                [sys.executable, "-S", "-c", program, str(path), str(slot.memory.fd), report().hex()],
                os.environ, drain_s, self.health, self.stopping,
            )
            for slot, path, program in zip(slots, self.directories, programs, strict=True)
        ]  # fmt: skip
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            run_workers(self.workers, self.health, self.stopping)
        except BaseException as error:
            self.error = error

    def starts(self, number: int) -> int:
        path = self.directories[number] / "up"
        return len(path.read_text()) if path.exists() else 0

    def pids(self) -> list[int]:
        return [pid for worker in self.workers if (pid := worker._process.pid) is not None]

    def ends_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end(self) -> None:
        self.stopping.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S_FIRST", 0.02)
    monkeypatch.setattr(supervisor, "PAUSE_S_SECOND", 0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*programs: str, **settings: float) -> Run:
        runs.append(Run(tmp_path, list(programs), **settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def test_at_a_stop_every_worker_gets_one_signal_and_is_waited_for(start: Callable[..., Run]) -> None:
    run = start(WILLING, WILLING)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    pids = run.pids()
    assert len(pids) == 2
    run.stopping.set()
    assert run.ends_within(10)
    assert run.error is None
    assert [(path / "received").read_text() for path in run.directories] == ["1", "1"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert [worker.restarts for worker in run.workers] == [0, 0]


def test_a_worker_that_is_killed_is_started_again_and_the_other_is_left_alone(start: Callable[..., Run]) -> None:
    run = start(WILLING, WILLING)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    other = run.workers[1]._process.pid
    os.kill(run.pids()[0], signal.SIGKILL)
    wait_until(lambda: run.starts(0) == 2)
    assert run.workers[1]._process.pid == other
    assert [worker.restarts for worker in run.workers] == [1, 0]


def test_health_names_the_worker_that_ended_and_how(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S_FIRST", 30.0)
    run = start(WILLING, WILLING)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    assert run.health.not_alive() == []
    os.kill(run.pids()[1], signal.SIGKILL)
    wait_until(lambda: bool(run.health.not_alive()))
    assert run.health.not_alive() == ["worker 1: worker 1 ended with signal 9; restarting it"]


def test_a_worker_that_ends_at_each_start_ends_all_after_five_with_one_line(start: Callable[..., Run]) -> None:
    run = start(WILLING, BROKEN)
    assert run.ends_within(30)
    assert isinstance(run.error, WorkerEndedError)
    assert str(run.error).startswith("worker 1 ended with status 3, for the 5th time in a row within 60 s")
    assert "\n" not in str(run.error)
    assert run.starts(1) == 5
    assert (run.directories[0] / "received").read_text() == "1", "the other is drained"


def test_lives_that_were_long_enough_are_not_counted(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_LIFE_S", 0.0)
    run = start(BROKEN)
    wait_until(lambda: run.starts(0) > 6)
    assert run.error is None


@pytest.mark.parametrize("hangs", ["no answer for 30 s", ""])
def test_the_end_of_a_ready_worker_that_hung_is_no_kill_from_outside(hangs: str) -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    worker = SupervisedWorker(
        WorkerSlot(0, WorkerMemory.create()), command, os.environ, 0.0, HealthState(30.0), Stopping()
    )

    def watch() -> str:
        worker._was_ready = True
        return hangs

    worker._watch = watch  # type: ignore[method-assign]
    worker._live()
    assert worker._was_ready == (not hangs)


def pauses_of(lives: list[tuple[float, bool, int]]) -> list[float]:
    """The pauses before the restarts; of each life the seconds, whether it was ready, and the exit status."""
    pauses: list[float] = []
    left = iter(lives)
    stopping: Any = SimpleNamespace(is_set=lambda: len(pauses) == len(lives), wait=pauses.append)
    worker = SupervisedWorker(WorkerSlot(0, WorkerMemory.create()), ["none"], {}, 5.0, HealthState(30.0), stopping)

    def live() -> float:
        lived_s, worker._was_ready, status = next(left)
        worker._process = SimpleNamespace(exit_status=status)  # type: ignore[assignment]
        return lived_s

    worker._live = live  # type: ignore[method-assign]
    worker.run()
    return pauses


def test_only_the_second_quick_death_in_a_row_is_followed_by_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S_FIRST", PAUSE_S_FIRST)
    monkeypatch.setattr(supervisor, "PAUSE_S_SECOND", PAUSE_S_SECOND)
    quick, long = (1.0, True, 1), (3_600.0, True, 1)
    assert pauses_of([quick, quick, quick, quick, long, long, quick]) == [0, 0.5, 1, 2, 0, 0, 0.5]


def test_a_ready_worker_that_is_killed_again_and_again_is_restarted_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S_FIRST", PAUSE_S_FIRST)
    assert pauses_of([(1.0, True, -signal.SIGKILL)] * 10) == [0] * 10
    with pytest.raises(WorkerEndedError, match="signal 9, for the 5th time"):
        # out of memory at each start, for example
        pauses_of([(1.0, False, -signal.SIGKILL)] * 10)


def test_the_standby_replaces_a_worker_that_ended_and_a_new_process_where_there_is_none(tmp_path: Path) -> None:
    taken: list[int] = []
    standby = OwnedProcess("standby", [sys.executable, "-S", "-c", "input(); input()"], None, os.environ, reads=True)
    standby.start()

    def take(number: int) -> OwnedProcess | None:
        taken.append(number)
        return standby if len(taken) == 1 else None

    (tmp_path / "7").mkdir()
    command = [sys.executable, "-S", "-c", WILLING, str(tmp_path / "7")]
    health, stopping = HealthState(30.0), Stopping()
    worker = SupervisedWorker(WorkerSlot(7, WorkerMemory.create()), command, os.environ, 5.0, health, stopping, take)
    thread = threading.Thread(target=worker.run)
    thread.start()
    up = tmp_path / "7" / "up"
    try:
        wait_until(up.exists)
        assert taken == []
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        wait_until(lambda: worker._process is standby)
        assert standby.pid is not None
        os.kill(standby.pid, signal.SIGKILL)
        wait_until(lambda: len(up.read_text()) == 2)
        assert (taken, worker.restarts) == ([7, 7], 2)
    finally:
        stopping.set()
        thread.join()
    assert not worker.running


def test_a_standby_is_started_when_all_workers_are_ready_and_not_before(start: Callable[..., Run]) -> None:
    health, stopping, calls = HealthState(30.0), Stopping(), list[list[str]]()

    class Ready:
        def run(self) -> None:
            stopping.wait()

    health.waiting("worker 0", "starting")
    workers: Any = [Ready()]
    thread = threading.Thread(
        target=run_workers, args=(workers, health, stopping, lambda: calls.append(health.not_ready()))
    )
    thread.start()
    assert calls == []
    health.ok("worker 0")
    wait_until(lambda: len(calls) > 1)
    stopping.set()
    thread.join()
    assert calls == [[]] * len(calls)


@pytest.mark.parametrize(
    ("kafka", "named"),
    [
        (KafkaSettings(), r"supervisor-[0-9a-f]{12}"),
        (KafkaSettings(instance="pod-7"), "pod-7"),
        (KafkaSettings(client="kafka-python"), ""),
    ],
    ids=["no name", "a name", "kafka-python"],
)
def test_workers_are_static_members_and_those_with_the_supervisors_name_leave_at_its_end(
    kafka: KafkaSettings, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Any] = []
    monkeypatch.setattr(supervisor, "remove_members", lambda kafka, group, names, timeout_s: removed.append(names))
    config = Config(kafka=kafka, worker=WorkerSettings(processes=2))
    with ExitStack() as stack:
        instance = supervisor._with_instance(config, stack).kafka.instance
        assert re.fullmatch(named, instance)
        assert removed == []
    assert removed == ([[f"{instance}-0", f"{instance}-1"]] if kafka == KafkaSettings() else [])


def test_a_worker_that_will_not_end_is_killed_when_its_time_is_over(start: Callable[..., Run]) -> None:
    run = start(STUBBORN, WILLING, drain_s=1.0)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    pids = run.pids()
    run.stopping.set()
    assert run.ends_within(8)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert (run.directories[1] / "received").read_text() == "1"


def test_a_worker_that_hangs_is_ended_and_started_again(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S_FIRST", 30.0)
    monkeypatch.setattr(supervisor, "HANGS_S", 0.2)
    run = start(REPORTING, REPORTING)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    written = run.directories[0] / "written"
    written.write_bytes(report("partition 3: no progress"))
    written.rename(run.directories[0] / "hangs")
    wait_until(lambda: run.workers[0].restarts == 1)
    assert run.health.not_alive() == ["worker 0: worker 0 ended with signal 15; restarting it"]
    assert run.workers[1].restarts == 0


def test_a_worker_that_gives_no_answer_is_killed_and_started_again(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HUNG_GRACE_S", 0.5)
    monkeypatch.setattr(supervisor, "SILENT_S", 0.2)
    run = start(REPORTING, drain_s=60.0, stall_s_max=0.5)
    wait_until(lambda: run.starts(0) == 1)
    run.workers[0]._process.freeze()
    wait_until(lambda: run.starts(0) == 2)


NOT_ALIVE, FOR_EVER = ["loop: no progress"], 1e9


@pytest.mark.parametrize(
    ("reported", "from_s", "until_s", "suspended_s", "result", "ends_s"),
    [
        (NOT_ALIVE, 10.0, FOR_EVER, 0.0, "loop: no progress", 10.0 + supervisor.HANGS_S),
        (NOT_ALIVE, 10.0, 12.0, 0.0, "", 60.0),
        (None, 10.0, FOR_EVER, 0.0, "no answer for 3", 40.0),
        (None, 40.0, 41.0, 40.0, "", 60.0),
    ],
    ids=["not alive", "not alive for a moment", "no answer", "a suspended machine"],
)
def test_a_worker_hangs_that_is_not_alive_or_does_not_answer_for_some_time(
    monkeypatch: pytest.MonkeyPatch,
    reported: list[str] | None,
    from_s: float,
    until_s: float,
    suspended_s: float,
    result: str,
    ends_s: float,
) -> None:
    """On a simulated clock, which begins with a pause of `suspended_s`. Reports come every second; from `from_s` to
    `until_s` with that content, or none.
    """
    clock, pauses_s = SetClock(), iter([suspended_s] if suspended_s else [])
    monkeypatch.setattr(supervisor, "time", clock)
    stopping: Any = SimpleNamespace(
        is_set=lambda: clock.now_s > 60.0, wait=lambda seconds: clock.sleep(next(pauses_s, seconds))
    )

    class Slot:
        """A worker's slot, whose memory has a report for each second except those in which none comes."""

        number = 0
        memory = property(lambda self: SimpleNamespace(fd=0, number=self.reports))

        @property
        def reports(self) -> int:
            times_s = range(1, int(clock.now_s) + 1)
            return 1 + sum(reported is not None or not from_s < time_s < until_s for time_s in times_s)

        def show_health(self, name: str, health: HealthState) -> list[str]:
            return (reported or []) if from_s < clock.now_s < until_s else []

    slot: Any = Slot()
    worker = SupervisedWorker(slot, ["none"], {}, 5.0, HealthState(30.0), stopping)
    worker._process = SimpleNamespace(running=True)  # type: ignore[assignment]
    assert worker._watch().startswith(result)
    assert bool(result) == (clock.now_s < 60.0)
    assert ends_s < clock.now_s < ends_s + 2.0


@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]], ids=["killed", "stopped twice"]
)
def test_workers_die_with_a_supervisor_that_ends_at_once(tmp_path: Path, signals: list[signal.Signals]) -> None:
    (tmp_path / "0").mkdir()
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from streaming.health_state import HealthState
import os
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_report import WorkerSlot
from streaming.service.supervisor import SupervisedWorker, run_workers
from streaming.service.waiting import stop_signals
health = HealthState(30.0)
command = [sys.executable, "-S", "-c", {STUBBORN!r}, {str(tmp_path / "0")!r}]
with stop_signals() as stopping:
    stopping.on_set(Path({str(tmp_path / "stopping")!r}).touch)
    worker = SupervisedWorker(WorkerSlot(0, WorkerMemory.create()), command, os.environ, 50.0, health, stopping)
    run_workers([worker], health, stopping)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until((tmp_path / "0" / "up").exists)
        (child,) = psutil.Process(parent.pid).children()
        for signal_number in signals[:-1]:
            parent.send_signal(signal_number)
            wait_until((tmp_path / "stopping").exists)
        assert parent.poll() is None
        parent.send_signal(signals[-1])
        assert parent.wait(60.0) == -signals[-1]
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


# --- a worker's slot and memory --------------------------------------------------------------------------------------


def test_workers_have_names_of_their_own_no_health_server_and_otherwise_the_same_settings() -> None:
    environment = worker_environment(Config(kafka=KafkaSettings(group="g", instance="pod-7"), delivery="exactly-once"))
    found = [settings_in(environment, number) for number in range(2)]
    assert [config.kafka.instance for config in found] == ["pod-7-0", "pod-7-1"]
    assert [config.health.enabled for config in found] == [False] * 2
    assert [(config.kafka.group, config.delivery) for config in found] == [("g", "exactly-once")] * 2
    assert environment.items() >= os.environ.items()


def test_workers_without_names_stay_without() -> None:
    assert settings_in(worker_environment(Config()), 1).kafka.instance == ""


@pytest.mark.parametrize("environment", [{}, {SETTINGS_VARIABLE: "{"}])
def test_a_worker_without_a_supervisor_is_one_line(environment: dict[str, str]) -> None:
    with pytest.raises(SettingError, match=r"CASCADE_WORKER_SETTINGS: .* set worker\.processes instead"):
        settings_in(environment, 0)


def test_the_supervisor_reads_the_account_and_it_is_gone_at_the_next_start() -> None:
    slot, ledger = WorkerSlot(0, WorkerMemory.create()), Ledger()
    assert (slot.account(), slot.metrics()) == (None, [])
    with slot.reported(ledger, CollectorRegistry(), HealthState(30.0)):
        ledger.count_labels(3)
    account = slot.account()
    assert account is not None
    assert account.counters.labels == 3
    slot.memory.clear()
    assert slot.account() is None


def test_a_killed_workers_account_was_reported_while_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.service.worker_report.REPORT_INTERVAL_S", 0.1)
    slot, ledger = WorkerSlot(0, WorkerMemory.create()), Ledger()
    with slot.reported(ledger, CollectorRegistry(), HealthState(30.0)):
        ledger.count_labels(3)
        wait_until(lambda: (found := slot.account()) is not None and found.counters.labels == 3)


def test_a_report_of_another_release_is_one_line() -> None:
    slot = WorkerSlot(3, WorkerMemory.create())
    slot.memory.write(b"\x81\xa1x\x01")
    for read in (slot.account, slot.metrics, lambda: slot.show_health("worker 3", HealthState(30.0))):
        with pytest.raises(DataError, match=r"worker 3: unreadable report .*; restart the service"):
            read()


# Replaces its message for ever, each time with a character repeated, so that a reader sees whether it is whole.
WRITING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from streaming.service.worker_memory import WorkerMemory
memory, number = WorkerMemory(int(sys.argv[1])), 0
while True:
    number += 1
    memory.write(bytes([number % 251]) * (100_000 + number % 1_000))
"""


def test_a_message_is_whole_while_it_is_replaced_and_after_the_writer_was_killed() -> None:
    memory = WorkerMemory.create()
    assert (memory.read(), memory.number) == (b"", 0)
    command = [sys.executable, "-S", "-c", WRITING, str(memory.fd)]
    for _ in range(3):
        with subprocess.Popen(command, pass_fds=[memory.fd]) as writer:
            begin = memory.number
            wait_until(lambda begin=begin: memory.number > begin)
            messages = [memory.read() for _ in range(200)]
            writer.kill()
        messages.append(memory.read())
        assert all(message == message[:1] * len(message) for message in messages)
        assert min(map(len, messages)) >= 100_000


def test_a_message_that_does_not_fit_is_refused_and_the_one_before_stays() -> None:
    memory = WorkerMemory.create()
    memory.write(b"before")
    with pytest.raises(ValueError, match="at most"):
        memory.write(bytes(MESSAGE_BYTES_MAX + 1))
    assert memory.read() == b"before"
    memory.write(bytes(MESSAGE_BYTES_MAX))
    memory.write(b"after")
    assert memory.read() == b"after"
