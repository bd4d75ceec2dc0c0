"""The end of a peer in Python: by SIGTERM or SIGINT."""

from __future__ import annotations

import signal
from types import FrameType


class Stop:
    """`wanted` becomes True with SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
