"""`cascade bench echo`: the echo's messages, ratios to it, context switches, arguments, and a short run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.cluster import parse_decision_id
from bench.echo.report import EchoReport, figures_of, show, standings
from bench.echo.turn import Idle, Turn
from bench.echo.variants import ECHO, EchoRun, Variant, environment_of, variants_of
from bench.load import LoadReport
from bench.open_loop import PathLatency
from bench.peers import Job, PeerProcess
from bench.peers.echo import MESSAGE
from bench.pipeline.processes import Switches, switches_between, switches_of
from cascade.cli import main
from cascade.config import KafkaSettings
from cascade.errors import CascadeError, LocalPartError
from cascade.ledger.machine import describe_machine
from streaming.kafka import make_consumer, make_producer
from streaming.pipeline.decisions import decode_decision
from tests.conftest import Broker

# --- the echo ---------------------------------------------------------------------------------------------------------


def test_an_echo_is_a_screened_decision_that_names_its_record() -> None:
    decision = decode_decision(MESSAGE % (3, 1 << 40), "json")
    assert parse_decision_id(decision.decision_id) == (3, 1 << 40)
    assert (decision.stage, decision.degraded) == ("screener", False)


def job_of(broker: Broker, new_topic: Callable[..., str], out: Path) -> Job:
    transactions = new_topic()
    decisions = new_topic()
    return Job(bootstrap=broker.bootstrap, transactions=transactions, decisions=decisions, group=transactions, out=out)


def echo_of(job: Job) -> PeerProcess:
    return PeerProcess(ECHO, [sys.executable, "-m", "bench.peers.echo", "--commit-s=0.2"], {}, job)


@pytest.mark.kafka
def test_each_message_is_echoed_once_with_its_key_also_after_a_restart(
    broker: Broker, new_topic: Callable[..., str], tmp_path: Path
) -> None:
    job, kafka = job_of(broker, new_topic, tmp_path), KafkaSettings(bootstrap=broker.bootstrap)
    keys = [str(number).encode() for number in range(300)]

    def send(some: list[bytes]) -> None:
        producer = make_producer(kafka)
        producer.send_many(job.transactions, some, [b"anything"] * len(some))
        producer.close(10.0)

    def read(count: int) -> list[tuple[bytes | None, int]]:
        found: list[tuple[bytes | None, int]] = []
        with closing(make_consumer(kafka, None)) as consumer:
            consumer.assign(consumer.partitions_for(job.decisions))
            give_up_s = time.monotonic() + 30.0
            while len(found) < count and time.monotonic() < give_up_s:
                for batch in consumer.poll(0.1, 1_000):
                    offsets = (
                        parse_decision_id(decode_decision(value or b"", "json").decision_id) for value in batch.values
                    )
                    found += zip(batch.keys, (offset for _, offset in offsets), strict=True)
        return found

    send(keys[:200])
    with echo_of(job) as process:
        process.wait_ready()
        read(200)
        process.check_running()
        assert process.stop()
    send(keys[200:])
    with echo_of(job):
        assert read(300) == [(key, offset) for offset, key in enumerate(keys)]


def test_an_echo_without_a_topic_ends_with_a_line(tmp_path: Path) -> None:
    job = Job(bootstrap="127.0.0.1:1", transactions="", decisions="d", group="g", out=tmp_path)
    with echo_of(job) as process, pytest.raises(LocalPartError, match="echo: ") as raised:
        process.wait_until(lambda: False, 20.0)
    assert "\n" not in str(raised.value)


# --- context switches -------------------------------------------------------------------------------------------------


def test_context_switches_of_every_thread_are_counted() -> None:
    go, stop = threading.Event(), threading.Event()

    def wait_often() -> None:
        go.wait()
        for _ in range(200):
            time.sleep(0.0001)
        stop.wait()

    threads = [threading.Thread(target=wait_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = switches_of([os.getpid()])
    go.set()
    time.sleep(0.3)
    after = switches_of([os.getpid()])
    stop.set()
    for thread in threads:
        thread.join()
    own = {thread.native_id for thread in threads}
    assert own <= after.keys()
    counts = {thread: after[thread].voluntary - before[thread].voluntary for thread in own if thread is not None}
    assert all(count >= 200 for count in counts.values())
    assert switches_between(before, after).voluntary >= sum(counts.values())


def test_a_child_counts_and_a_process_that_has_ended_has_no_switches() -> None:
    code = "import subprocess; subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        give_up_s = time.monotonic() + 10.0
        while len(threads := switches_of([parent.pid])) < 2 and time.monotonic() < give_up_s:
            time.sleep(0.02)
        parent.communicate(b"")
    assert parent.pid in threads
    assert len(threads) == 2
    assert switches_of([parent.pid, None]) == {}


def test_threads_that_began_count_from_zero_and_those_that_ended_are_left_out() -> None:
    before = {1: Switches(10, 1), 2: Switches(500, 50)}
    after = {1: Switches(14, 2), 3: Switches(7, 3)}
    assert switches_between(before, after) == Switches(11, 4)


# --- ratios -----------------------------------------------------------------------------------------------------------


def latency(p50_ms: float) -> PathLatency:
    return PathLatency(count=9, p50_ms=p50_ms, p99_ms=4 * p50_ms, p999_ms=6 * p50_ms, max_ms=9 * p50_ms, curve={})


def turn(variant: str, round_: int, rate: float, cpu_us: float, p50_ms: float, **changed: object) -> Turn:
    found = Turn(
        variant=variant,
        round=round_,
        rate=rate,
        counted=100,
        cpu_us=cpu_us,
        voluntary=2.0,
        involuntary=0.0,
        paths={"screened": latency(p50_ms)},
        escalated_share=0.0,
        degraded_share=0.0,
        missing=0,
        load=LoadReport(sent=100, seconds=1.0, behind_ms_p99=0.2, behind_ms_max=0.4),
        idle=None,
    )
    return msgspec.structs.replace(found, **changed)


def both(p50_ms: float) -> dict[str, PathLatency]:
    return {"screened": latency(p50_ms), "escalated": latency(10 * p50_ms)}


IDLE = Idle(seconds=5.0, core_share=0.004, voluntary_per_s=20.0, involuntary_per_s=1.0)
TURNS = [
    turn("echo", 0, 100.0, 100.0, 1.0, idle=IDLE),
    turn("cascade", 0, 100.0, 300.0, 2.0, idle=msgspec.structs.replace(IDLE, core_share=0.01)),
    turn("echo", 0, 1_000.0, 50.0, 1.0),
    turn("cascade", 0, 1_000.0, 100.0, 2.0, paths=both(2.0), escalated_share=0.02, degraded_share=0.01, missing=1),
    turn("cascade", 1, 100.0, 800.0, 9.0),
    turn("echo", 1, 100.0, 200.0, 3.0),
    turn("cascade", 1, 1_000.0, 600.0, 8.0, paths=both(8.0), missing=2),
    turn("echo", 1, 1_000.0, 100.0, 2.0),
]
RUN = EchoRun(variants=[Variant(name=ECHO, echo=True), Variant(name="cascade")], rates=[100.0, 1_000.0], rounds=2)


def report_of(turns: list[Turn]) -> EchoReport:
    return EchoReport(run=RUN, standings=standings(turns), turns=turns, machine=describe_machine(), elapsed_s=1.0)


def test_ratios_are_of_the_same_rate_and_round_and_their_median_counts() -> None:
    found = {(standing.variant, standing.rate): standing for standing in standings(TURNS)}
    assert list(found) == [("echo", 100.0), ("cascade", 100.0), ("echo", 1_000.0), ("cascade", 1_000.0)]
    slow, quick = found["cascade", 100.0], found["cascade", 1_000.0]
    # 300 / 100 and 800 / 200; the ratio of the medians would be 550 / 150
    assert (slow.ratios["cpu_us"].median, slow.ratios["cpu_us"].largest) == (3.5, 4.0)
    assert quick.ratios["cpu_us"].median == 4.0
    assert (quick.figures["cpu_us"].median, quick.figures["p99_ms"].median) == (350.0, 20.0)
    assert (quick.missing, quick.escalated_share, quick.degraded_share) == (3, 0.01, 0.005)
    assert set(found["echo", 100.0].ratios["cpu_us"].__struct_fields__) == {"median", "least", "largest"}
    assert found["echo", 100.0].ratios["cpu_us"].median == 1.0


def test_escalated_rows_are_compared_with_all_rows_of_the_echo() -> None:
    quick = standings(TURNS)[-1]
    # 20 / 1 and 80 / 2 ms
    assert quick.ratios["escalated_p50_ms"].median == 30.0
    assert "escalated_p50_ms" not in standings(TURNS)[0].ratios


def test_a_figure_that_is_zero_with_the_echo_has_no_ratio() -> None:
    assert "involuntary" in figures_of(TURNS[0])
    assert "involuntary" not in standings(TURNS)[1].ratios


def test_idle_figures_are_those_of_the_turns_that_measured_them() -> None:
    first, second, *others = standings(TURNS)
    assert first.figures["idle_core_share"].median == 0.004
    assert second.ratios["idle_core_share"].median == 2.5
    assert not any("idle_core_share" in standing.figures for standing in others)


def test_the_tables_fit_eighty_columns_and_name_late_loads() -> None:
    late = LoadReport(sent=1, seconds=1.0, behind_ms_p99=7.5, behind_ms_max=9.0)
    name = "cascade, kafka-python, onnxruntime, exactly-once"
    wide = [
        msgspec.structs.replace(
            each,
            variant=each.variant.replace("cascade", name),
            rate=100 * each.rate,
            cpu_us=12_345.6,
            voluntary=123.4,
            involuntary=123.4,
            paths=both(2_345.6),
            load=late,
        )
        for each in TURNS
    ]
    console = Console(width=80, record=True)
    show(report_of(wide), console)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "100,000/s" in text
    assert "at 100,000/s the load was up to 7.5 ms late" in text
    assert "12,346" in text


# --- arguments --------------------------------------------------------------------------------------------------------


def checkout(directory: Path, name: str) -> Path:
    (directory / name / "cascade").mkdir(parents=True)
    (directory / name / "cascade" / "cli.py").touch()
    return directory / name


def test_names_contain_the_settings_in_which_services_differ(tmp_path: Path) -> None:
    before = checkout(tmp_path, "before")
    single = variants_of([before], ["librdkafka"], ["triton"], ["at-least-once"])
    assert [variant.name for variant in single] == ["echo", "cascade", "before"]
    assert [variant.checkout for variant in single] == [None, None, str(before)]
    assert msgspec.json.decode(msgspec.json.encode(single), type=list[Variant]) == single
    assert {variant.backend for variant in single[1:]} == {"triton"}
    several = variants_of([], ["librdkafka"], ["triton", "onnxruntime"], ["at-least-once", "exactly-once"])
    assert [variant.name for variant in several[1:3]] == [
        "cascade, triton, at-least-once",
        "cascade, triton, exactly-once",
    ]
    assert several[2].settings()["delivery"] == "exactly-once"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["none"], "no cascade/cli.py in it"),
        (["cascade"], "each directory needs a name of its own"),
        (["echo"], "each directory needs a name of its own"),
        (["a/before", "b/before"], "each directory needs a name of its own"),
    ],
)
def test_another_checkout_needs_a_service_and_a_name_of_its_own(tmp_path: Path, names: list[str], reason: str) -> None:
    (tmp_path / "none").mkdir()
    directories = [tmp_path / name if name == "none" else checkout(tmp_path, name) for name in names]
    with pytest.raises(CascadeError, match=re.escape(reason)):
        variants_of(directories, ["librdkafka"], ["triton"], ["at-least-once"])


def test_another_checkout_runs_its_own_code_wherever_the_command_runs(tmp_path: Path) -> None:
    other = checkout(tmp_path, "other")
    (other / "cascade" / "__init__.py").touch()
    (other / "cascade" / "__main__.py").write_text("import sys; print(__file__)")
    here = Path(__file__).parents[2]
    environment = {**os.environ, **environment_of(str(other))}
    done = subprocess.run(
        [sys.executable, "-m", "cascade"], cwd=here, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(other / "cascade" / "__main__.py")
    assert environment_of(None) == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rate", "100", "--rate", "100"], "--rate: given twice"),
        (["--rate", "100000", "--seconds", "600"], "at most 8,197 for 610 s"),
        (["--backend", "abacus"], "--backend abacus: use triton or onnxruntime"),
        (["--delivery", "never"], "--delivery never: use at-least-once or exactly-once"),
        (["--backend", "triton", "--backend", "triton"], "triton: given twice"),
        (["--client", "kafka-python", "--delivery", "exactly-once"], "has no exactly-once delivery"),
    ],
)
def test_a_wrong_argument_is_a_line(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "echo", "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.kafka
@pytest.mark.long
def test_a_run_compares_the_service_with_the_echo_and_nothing_is_missing(
    tmp_path: Path, kafka_parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CARDS": 300, "TERMINALS": 300, "BROKER_WARM_UP_S": 0.5}.items():
        monkeypatch.setattr(f"bench.echo.run.{name}", value)
    json = tmp_path / "report.json"
    command = ["bench", "echo", "--rate", "300", "--seconds", "2", "--warm-up", "1", "--rounds", "1"]
    # the markers of Kafka's transactions are records without a decision
    command += ["--idle-seconds", "1", "--escalation-share", "0.05", "--delivery", "exactly-once"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json", str(json)]) == 0
    report = msgspec.json.decode(json.read_bytes(), type=EchoReport)
    echo, cascade = report.turns
    assert (echo.variant, cascade.variant) == ("echo", "cascade")
    assert echo.counted == cascade.counted == pytest.approx(600, abs=80)
    assert (echo.missing, cascade.missing) == (0, 0)
    assert echo.paths.keys() == {"screened"}
    assert "screened" in cascade.paths
    assert 0.02 < cascade.escalated_share < 0.1
    for measured in report.turns:
        assert measured.cpu_us > 0
        assert measured.voluntary > 0
        assert measured.idle is not None
        assert 0 <= measured.idle.core_share < 1
        assert measured.idle.voluntary_per_s > 0
    assert report.standings[1].ratios["cpu_us"].median == cascade.cpu_us / echo.cpu_us
    assert "300/s" in capsys.readouterr().out
