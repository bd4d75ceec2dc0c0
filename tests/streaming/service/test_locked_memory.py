"""Locked memory, in processes of their own: what is locked stays so until its process ends."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.service.locked_memory import locking_problem

PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
LIMIT_BYTES = 65_536
LOCKED = """
import json, mmap
from streaming.service.locked_memory import lock_memory

def of_status(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024

def is_locked(start):
    found = ""
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(one, 16) for one in words[0].split("-"))
        elif words[0] == "VmFlags:" and low <= start < high:
            found = words
    return "lo" in found

import ctypes
before = of_status("VmLck")
lock_memory()
resident_mb = of_status("VmRSS")
later = mmap.mmap(-1, 256 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(later))
print(json.dumps({
    "before_mb": before, "after_mb": of_status("VmLck"), "locked": is_locked(address),
    "grown_mb": of_status("VmRSS") - resident_mb,
}))
"""


def forbid() -> None:
    """In the child: a finite limit, and without the capability after the next exec."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT_BYTES, LIMIT_BYTES))


@pytest.mark.skipif(bool(locking_problem()), reason=locking_problem())
def test_what_comes_later_is_locked_too_and_takes_no_memory_before_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", LOCKED], stdout=subprocess.PIPE, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["before_mb"] == 0
    assert found["after_mb"] > 256
    assert found["locked"]
    assert found["grown_mb"] < 64


def test_where_it_is_not_allowed_the_start_stops_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cascade.toml"
    path.write_text("[worker]\nlock_memory = true\n")
    command = [sys.executable, "-m", "cascade", "run", "--config", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=forbid, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert all(part in line for part in ("worker.lock_memory = True", "64 KiB", "IPC_LOCK"))


def test_doctor_reports_it_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "cascade.toml"
    path.write_text("[worker]\nlock_memory = true\n[kafka]\nbootstrap = '127.0.0.1:1'\n")
    program = (
        "import sys; from cascade.cli import main; from streaming.service import doctor\n"
        "doctor.PROBE_TIMEOUT_S = 0.2\n"
        "sys.exit(main(['doctor', '--json', '--config', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=forbid, timeout=120)
    (limits,) = [finding for finding in json.loads(done.stdout) if finding["check"] == "limits"]
    assert limits["status"] == "failed"
    assert "worker.lock_memory" in limits["text"]
    assert "IPC_LOCK" in limits["text"]
