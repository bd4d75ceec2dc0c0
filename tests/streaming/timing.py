"""What a test may say of time on a machine that others use as well."""

from __future__ import annotations

import time
from collections.abc import Callable


def quickest_cpu_s(work: Callable[[], object], times: int = 3) -> float:
    """CPU seconds of this thread for `work`, the least of `times` tries: what disturbs one rarely disturbs all."""
    took_s = []
    for _ in range(times):
        started_s = time.thread_time()
        work()
        took_s.append(time.thread_time() - started_s)
    return min(took_s)
