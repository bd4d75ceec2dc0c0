"""The command line as a user meets it: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import structlog

from cascade import __version__, cli
from cascade.bundle import SHIPPED_BUNDLE

COMMANDS = [name for name, command in cli.COMMANDS.items() if not command.group]


def cascade(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cascade", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


@pytest.fixture(autouse=True)
def restored_log() -> Iterator[None]:
    """A command sets the log up for the standard error of its test, which pytest closes afterwards."""
    yield
    structlog.reset_defaults()


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a call in this process, ten times as fast as in a new one."""
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, out, err = called(capsys, *arguments)
    assert status == 1, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"cascade {arguments[0]}: ")
    return line


def test_help_lists_every_command_with_a_line() -> None:
    done = cascade("--help")
    assert done.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<15} {command.help}" in done.stdout
    assert "Start with `cascade demo`" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())

    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed[:6] == ["demo", "simulate", "train", "recalibrate", "doctor", "run"]


@pytest.mark.parametrize(("arguments", "wanted"), [((), 2), (("--help",), 0), (("-h",), 0), (("help",), 0)], ids=str)
def test_no_command_shows_the_help_as_wrong_usage_and_each_way_to_ask_for_help_works(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], wanted: int
) -> None:
    status, out, _ = called(capsys, *arguments)
    assert status == wanted
    assert "Usage: cascade COMMAND" in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "--version") == (0, f"cascade {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = called(capsys, name, "--help")
    assert status == 0
    assert out.startswith(f"Usage: cascade {name} [OPTIONS]")
    shown = " ".join(out.replace("│", " ").split())
    options = [word for word in shown.split() if word.startswith("--") and word != "--help"]
    assert options
    # what the command does, and a line for each option
    assert len(shown) > 60 * (1 + len(set(options)) // 2)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_unknown_option_ends_with_2_and_the_usage_of_that_command(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, out, err = called(capsys, name, "--no-such-option")
    assert (status, out) == (2, "")
    assert err.startswith(f"Usage: cascade {name} [OPTIONS]")
    assert f"Try 'cascade {name} --help' for help." in err
    assert "No such option: --no-such-option" in err


def test_a_group_lists_its_commands_and_each_has_the_group_in_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, "local", "--help")
    assert status == 0
    assert all(name in out for name in ("install", "broker", "triton"))
    assert called(capsys, "local", "broker", "--help")[1].startswith("Usage: cascade local broker [OPTIONS]")


def test_an_unknown_command_is_answered_with_the_nearest_or_with_where_to_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert called(capsys, "repaly") == (2, "", "cascade: no command repaly; did you mean replay?\n")
    assert called(capsys, "xyzzy") == (2, "", "cascade: no command xyzzy; `cascade --help` lists them\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "--data", "x.parquet", "--out", "y", "--budget", "2"),
        ("train", "--data", "x.parquet", "--out", "y", "--validation", "soon"),
        ("train", "--data", "x.parquet", "--out", "y", "--until", "yesterday"),
        ("simulate",),
        ("simulate", "--out", "x.parquet", "--cards", "many"),
        ("replay",),
        ("local", "no-such-part"),
    ],
)
def test_wrong_usage_ends_with_2_and_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    status, _, err = called(capsys, *arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("rate", ["0", "-1", "fast", "nan", "inf"])
def test_a_rate_must_be_a_positive_number(capsys: pytest.CaptureFixture[str], tmp_path: Path, rate: str) -> None:
    data = tmp_path / "data.parquet"
    assert called(capsys, "simulate", "--out", str(data), "--cards", "20", "--days", "3")[0] == 0
    (tmp_path / "cascade.toml").write_text(f'[bundle]\npath = "{SHIPPED_BUNDLE}"\n')
    arguments = ("--data", str(data), "--config", str(tmp_path / "cascade.toml"))
    status, _, err = called(capsys, "replay", *arguments, "--rate", rate)
    assert status == 2
    assert "--rate" in err


def test_simulated_data_are_written_and_counted_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "data.parquet"
    arguments = ("--out", str(file), "--cards", "60", "--days", "20", "--seed", "3", "--fraud-share", "0.05", "--json")
    status, out, err = called(capsys, "simulate", *arguments)
    assert status == 0, err
    counts = json.loads(out)
    frame = pl.read_parquet(file)
    assert counts["file"] == str(file)
    assert counts["transactions"] == frame.height
    assert counts["frauds"] == (frame["fraud_pattern"] != "none").sum() == sum(counts["patterns"].values()) > 0
    assert counts["reported"] == frame["fraud"].sum()
    assert counts["ceiling"] is None
    again = tmp_path / "again.parquet"
    assert called(capsys, "simulate", "--out", str(again), *arguments[2:])[0] == 0
    assert again.read_bytes() == file.read_bytes(), "the same seed must give the same file"


def test_the_ceiling_of_simulated_data_is_printed_on_request(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        "--out",
        str(tmp_path / "x.parquet"),
        "--cards",
        "200",
        "--days",
        "60",
        "--terminals",
        "300",
        "--ceiling",
    )
    status, out, err = called(capsys, "simulate", *arguments, "--json")
    assert status == 0, err
    best = json.loads(out)["ceiling"]
    assert 0.7 < best["average_precision"] <= best["average_precision_truth"] + 0.05 <= 1.05
    assert f"average precision {best['average_precision']:.3f}" in called(capsys, "simulate", *arguments)[1]


def test_a_simulation_out_of_range_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "simulate", "--out", str(tmp_path / "x.parquet"), "--fraud-share", "2")
    assert "fraud_share" in line
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize("command", ["run", "evaluate", "replay", "doctor"])
@pytest.mark.parametrize(
    ("text", "key", "value", "remedy"),
    [
        ("[deadline]\nbudget_ms = -3", "deadline.budget_ms", "-3", "use 1 to 60000"),
        ('[deep]\nbackend = "gpu"', "deep.backend", "'gpu'", 'use "onnxruntime" or "triton"'),
        ("[worker]\nbatch_rows = 5", "worker.batch_rows", "", "did you mean batch_rows_max?"),
    ],
)
def test_a_wrong_setting_is_one_line_with_file_key_value_and_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, text: str, key: str, value: str, remedy: str
) -> None:
    file = tmp_path / "cascade.toml"
    file.write_text(text)
    data = () if command in ("run", "doctor") else ("--data", str(tmp_path / "x.parquet"))
    status, out, err = called(capsys, command, "--config", str(file), *data)
    assert status == 1
    shown = out + err
    assert "Traceback" not in shown
    if command != "doctor":  # which has a line for each of its checks
        assert len(err.splitlines()) == 1
    shown = " ".join(shown.replace("│", " ").split())
    assert all(part in shown for part in (key, value, remedy))


def test_a_bundle_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cascade.toml").write_text(f'[bundle]\npath = "{tmp_path / "nothing"}"\n')
    assert "point bundle.path at" in refused(capsys, "run", "--config", str(tmp_path / "cascade.toml"))


def test_a_worker_whose_name_is_not_in_the_environment_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POD_NAME", raising=False)
    file = tmp_path / "cascade.toml"
    file.write_text('[kafka]\ninstance_env = "POD_NAME"\n')
    line = refused(capsys, "run", "--config", str(file))
    assert f"{file}: kafka.instance_env = 'POD_NAME': that environment variable is not set; " in line


def test_a_repository_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "models"
    line = refused(capsys, "repository", "--bundle", str(SHIPPED_BUNDLE), "--out", str(out))
    assert f"{out}: cannot be written (" in line
    assert "a mount point cannot be replaced" in line


@pytest.mark.training
@pytest.mark.parametrize("name", ["absent.parquet", "data.xlsx"])
def test_data_that_cannot_be_read_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    line = refused(capsys, "train", "--data", str(tmp_path / name), "--out", str(tmp_path / "bundle"))
    assert name in line
    assert not (tmp_path / "bundle").exists()


def test_an_error_of_cascade_never_shows_a_traceback(tmp_path: Path) -> None:
    done = cascade("run", "--config", "absent.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("cascade run: absent.toml: ")
    assert "No such file" in done.stderr
    assert done.stderr.count("\n") == 1
