"""Who used the cores: a process that works, one that sleeps, and one that has to share its core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest

from bench.cores import CoreWatch

BUSY, ASLEEP = "while True: pass", "import time; time.sleep(60)"


def child(stack: ExitStack, program: str) -> psutil.Popen:
    process = psutil.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def test_the_use_of_cores_is_by_process() -> None:
    with ExitStack() as stack:
        busy, asleep = child(stack, BUSY), child(stack, ASLEEP)
        time.sleep(0.5)
        watch = CoreWatch.now({"busy": [busy.pid], "asleep": [asleep.pid], "absent": [None]})
        time.sleep(1.0)
        cores = watch.cores()
    assert cores.cores == os.cpu_count()
    assert list(cores.used) == ["busy", "asleep", "absent", "load", "others"]
    assert cores.used["busy"] > max(cores.used["asleep"], cores.used["absent"]) == 0.0
    assert cores.used["others"] >= 0.0


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not count waits for a core")  # noqa: PTH110
def test_a_process_that_shares_its_core_waits_for_it() -> None:
    with ExitStack() as stack:
        first, second = child(stack, BUSY), child(stack, BUSY)
        core = min(first.cpu_affinity())
        for process in (first, second):
            process.cpu_affinity([core])
        time.sleep(0.3)
        watch = CoreWatch.now({"first": [first.pid]})
        time.sleep(1.0)
        waited_share = watch.cores().waited_share
    assert waited_share is not None
    assert 0.2 < waited_share < 1.0
