"""The supervisor of several workers, on stand-ins for their processes: who is restarted, stopped, killed, given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cascade.config import Config, KafkaSettings
from cascade.errors import SettingError, WorkerEndedError
from cascade.ledger import Ledger
from streaming.health_state import HealthState
from streaming.service import supervisor
from streaming.service.supervisor import SupervisedWorker, run_workers
from streaming.service.waiting import Stopping
from streaming.service.worker_slot import WorkerSlot, write_settings
from tests.timing import SetClock, wait_until

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
# Tells its port as a worker does; alive, but for what the file `hangs` says while that is there.
ASKED = """
import http.server, json, os, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = sys.argv[1] + "/hangs"
        reasons = [open(path).read()] if os.path.exists(path) else []
        self.send_response(503 if reasons else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"waiting_for": reasons, "components": {}}).encode())
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
open(sys.argv[1] + ".port", "w").write(str(server.server_port))
open(sys.argv[1] + "/up", "a").write("x")
server.serve_forever()
"""
BROKEN = "import sys; open(sys.argv[1] + '/up', 'a').write('x'); sys.exit(3)"


class Run:
    """`run_workers` in a thread."""

    def __init__(self, directory: Path, programs: list[str], drain_s: float = 5.0, stall_s_max: float = 30.0) -> None:
        self.health, self.stopping = HealthState(stall_s_max), Stopping()
        self.error: BaseException | None = None
        self.directories = [directory / str(number) for number in range(len(programs))]
        for path in self.directories:
            path.mkdir()
        self.workers = [
            SupervisedWorker(
                WorkerSlot(number, directory), [sys.executable, "-S", "-c", program, str(self.directories[number])],
                drain_s, self.health, self.stopping,
            )
            for number, program in enumerate(programs)
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
    monkeypatch.setattr(supervisor, "HEALTH_INTERVAL_S", 0.05)
    monkeypatch.setattr(supervisor, "HANGS_S", 0.2)
    run = start(ASKED, ASKED)
    wait_until(lambda: run.starts(0) == run.starts(1) == 1)
    (run.directories[0] / "hangs").write_text("partition 3: no progress")
    wait_until(lambda: run.workers[0].restarts == 1)
    assert run.health.not_alive() == ["worker 0: worker 0 ended with signal 15; restarting it"]
    assert run.workers[1].restarts == 0


def test_a_worker_that_gives_no_answer_is_killed_and_started_again(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HUNG_GRACE_S", 0.5)
    monkeypatch.setattr("streaming.service.worker_health.TIMEOUT_S", 0.2)
    run = start(ASKED, drain_s=60.0, stall_s_max=0.5)
    wait_until(lambda: run.starts(0) == 1)
    run.workers[0]._process.freeze()
    wait_until(lambda: run.starts(0) == 2)


NOT_ALIVE, FOR_EVER = ["loop: no progress"], 1e9


@pytest.mark.parametrize(
    ("answer", "from_s", "until_s", "suspended_s", "result", "ends_s"),
    [
        (NOT_ALIVE, 10.0, FOR_EVER, 0.0, "loop: no progress", 10.0 + supervisor.HANGS_S),
        (NOT_ALIVE, 10.0, 12.0, 0.0, "", 60.0),
        (None, 10.0, FOR_EVER, 0.0, "no answer for 3", 40.0),
        (None, 40.0, 41.0, 40.0, "", 60.0),
    ],
    ids=["not alive", "not alive for a moment", "no answer", "a suspended machine"],
)
def test_a_worker_hangs_that_is_not_alive_or_does_not_answer_for_some_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: list[str] | None,
    from_s: float,
    until_s: float,
    suspended_s: float,
    result: str,
    ends_s: float,
) -> None:
    """On a simulated clock, which begins with a pause of `suspended_s`; from `from_s` to `until_s` with that answer."""
    clock, pauses_s = SetClock(), iter([suspended_s] if suspended_s else [])
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setattr(supervisor, "ask_health", lambda *_: answer if from_s < clock.now_s < until_s else [])
    stopping: Any = SimpleNamespace(
        is_set=lambda: clock.now_s > 60.0, wait=lambda seconds: clock.sleep(next(pauses_s, seconds))
    )
    slot = WorkerSlot(0, tmp_path)
    slot.write_port(1)
    worker = SupervisedWorker(slot, ["none"], 5.0, HealthState(30.0), stopping)
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
from streaming.service.worker_slot import WorkerSlot
from streaming.service.supervisor import SupervisedWorker, run_workers
from streaming.service.waiting import stop_signals
health = HealthState(30.0)
command = [sys.executable, "-S", "-c", {STUBBORN!r}, {str(tmp_path / "0")!r}]
with stop_signals() as stopping:
    stopping.on_set(Path({str(tmp_path / "stopping")!r}).touch)
    worker = SupervisedWorker(WorkerSlot(0, Path({str(tmp_path)!r})), command, 50.0, health, stopping)
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


# --- a worker's slot -------------------------------------------------------------------------------------------------


def test_workers_have_names_and_health_of_their_own_and_otherwise_the_same_settings(tmp_path: Path) -> None:
    config = Config(kafka=KafkaSettings(group="g", instance="pod-7"), delivery="exactly-once")
    write_settings(tmp_path, config)
    found = [WorkerSlot(number, tmp_path).read_settings() for number in range(2)]
    assert [config.kafka.instance for config in found] == ["pod-7-0", "pod-7-1"]
    assert [(config.health.host, config.health.port) for config in found] == [("127.0.0.1", 0)] * 2
    assert [(config.kafka.group, config.delivery) for config in found] == [("g", "exactly-once")] * 2


def test_workers_without_names_stay_without(tmp_path: Path) -> None:
    write_settings(tmp_path, Config())
    assert WorkerSlot(1, tmp_path).read_settings().kafka.instance == ""


def test_a_worker_without_a_supervisor_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"settings\.json: .* set worker\.processes instead"):
        WorkerSlot(0, tmp_path).read_settings()


def test_the_supervisor_reads_port_and_account_and_clears_them_at_the_next_start(tmp_path: Path) -> None:
    slot, ledger = WorkerSlot(0, tmp_path), Ledger()
    assert (slot.read_port(), slot.read_account()) == (None, None)
    slot.write_port(1234)
    with slot.account_written(ledger):
        ledger.count_labels(3)
    account = slot.read_account()
    assert account is not None
    assert (slot.read_port(), account.counters.labels) == (1234, 3)
    slot.clear()
    assert (slot.read_port(), slot.read_account()) == (None, None)


def test_a_killed_workers_account_was_written_while_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.service.worker_slot.ACCOUNT_INTERVAL_S", 0.1)
    slot, ledger = WorkerSlot(0, tmp_path), Ledger()
    with slot.account_written(ledger):
        ledger.count_labels(3)
        wait_until(lambda: (found := slot.read_account()) is not None and found.counters.labels == 3)
