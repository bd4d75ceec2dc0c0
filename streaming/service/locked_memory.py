"""Locks memory: pages that the process has used are neither swapped out nor dropped and read again from disk."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from cascade.errors import SettingError

# Linux, <sys/mman.h>, x86-64 and arm64: mapped pages, pages mapped later, and each only from its first use on. Without
# the last flag the feature state would take its maximum, gigabytes, from the start.
_CURRENT, _FUTURE, _ON_FAULT = 1, 2, 4
# Linux, <linux/capability.h>
_IPC_LOCK = 14
REMEDY = "raise the limit (ulimit -l unlimited, LimitMEMLOCK=infinity, or capability IPC_LOCK), or set it to false"


def lock_memory() -> None:
    """Locks the process's pages, later ones from their first use on; raises SettingError if that is not allowed.

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
    """Why memory cannot be locked here; empty if it can.

    Any finite limit is a problem: allocations beyond it would fail later.
    """
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit_bytes == resource.RLIM_INFINITY or _has_capability():
        return ""
    return f"only {limit_bytes // 1024:,} KiB of memory may be locked"


def _has_capability() -> bool:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(lines["CapEff"], 16) >> _IPC_LOCK & 1)
