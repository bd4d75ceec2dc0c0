"""Memory that stays: what the process has touched is neither swapped out nor dropped to be read from disk again."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from cascade.errors import SettingError

# Linux, <sys/mman.h>, x86-64 and arm64: what is mapped, what will be, and each page from its first use on. Without
# the last all of the state's room, gigabytes, would be there from the start.
_CURRENT, _FUTURE, _ON_FAULT = 1, 2, 4
# Linux, <linux/capability.h>
_IPC_LOCK = 14
REMEDY = "allow it (ulimit -l unlimited, LimitMEMLOCK=infinity, or the capability IPC_LOCK), or set it to false"


def lock_memory() -> None:
    """Lock the process's pages, those to come from their first use on; raises SettingError where that is not allowed.

    See mlockall(2), MCL_ONFAULT.
    """
    problem = locking_problem()
    if not problem:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_CURRENT | _FUTURE | _ON_FAULT):
            problem = os.strerror(ctypes.get_errno())
    if problem:
        raise SettingError("configuration", "worker.lock_memory", True, problem, REMEDY)


def locking_problem() -> str:
    """Why memory cannot be locked here; empty where it can be.

    A finite limit is refused even where what is mapped now would fit: memory asked for beyond it would be denied later.
    """
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit_bytes == resource.RLIM_INFINITY or _has_capability():
        return ""
    return f"only {limit_bytes // 1024:,} KiB of memory may be locked"


def _has_capability() -> bool:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(lines["CapEff"], 16) >> _IPC_LOCK & 1)
