"""Owned processes: a frozen process does nothing after `freeze` returns."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade.local_parts import OwnedProcess

# four threads that write bytes all the time: the file grows while any of them runs
BUSY = """
import sys, threading, time
def write():
    with open(sys.argv[1], "ab", buffering=0) as file:
        while True:
            file.write(b"-")
            time.sleep(0.0001)
for _ in range(4):
    threading.Thread(target=write).start()
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "written"
    path.touch()
    return path


@pytest.fixture
def busy(tmp_path: Path, written: Path) -> Iterator[OwnedProcess]:
    command = [sys.executable, "-c", BUSY, str(written)]
    with OwnedProcess("the busy process", command, tmp_path / "log", os.environ) as process:
        yield process
        process.kill()


def test_a_process_that_reads_gets_lines_and_the_end_of_the_file(tmp_path: Path) -> None:
    program = "import sys; open(sys.argv[1], 'w').write(repr(sys.stdin.readlines()))"
    written = tmp_path / "lines"
    command = [sys.executable, "-c", program, str(written)]
    process = OwnedProcess("the reader", command, tmp_path / "log", os.environ, reads=True)
    process.start()
    process.write_line("one")
    process.write_line("two")
    assert process._process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()
    process._process.wait(20)
    assert written.read_text() == repr(["one\n", "two\n"])
    process.stop()
    deaf = OwnedProcess("the deaf process", command, tmp_path / "log", os.environ)
    with pytest.raises(OSError, match="reads no input"):
        deaf.write_line("one")


def wait_for_more(written: Path) -> None:
    size, give_up_s = written.stat().st_size, time.monotonic() + 20
    while written.stat().st_size < size + 100:
        assert time.monotonic() < give_up_s, "it does not run"
        time.sleep(0.01)


def test_a_frozen_process_does_nothing_from_the_return_of_the_call_on(busy: OwnedProcess, written: Path) -> None:
    for _ in range(100):
        wait_for_more(written)
        busy.freeze()
        size = written.stat().st_size
        time.sleep(0.01)
        assert written.stat().st_size == size
        busy.thaw()
    wait_for_more(written)


def test_to_freeze_and_thaw_in_any_state_is_harmless_and_a_frozen_process_can_be_killed(
    busy: OwnedProcess, written: Path
) -> None:
    busy.thaw()
    busy.freeze()
    busy.freeze()
    busy.thaw()
    wait_for_more(written)
    busy.freeze()
    busy.kill()
    assert not busy.running
    busy.freeze()
    busy.thaw()
