"""Memory that a supervisor and a worker share: the worker leaves its newest message there.

Two buffers take turns, and a sequence number names the one that is complete. A worker that is killed while it writes
leaves its message before. Nobody waits for anybody: a message that was not read is replaced.
"""

from __future__ import annotations

import mmap
import os

# Ten times what an account and its metrics take; memory that was never written is not used.
MESSAGE_BYTES_MAX = 4 << 20
_HEADER_BYTES = mmap.PAGESIZE
_BYTES = _HEADER_BYTES + 2 * MESSAGE_BYTES_MAX


class WorkerMemory:
    """The memory behind the file descriptor `fd`, which a child process inherits; one process writes at a time.

    The header has the number of the newest message, 0 without one, and the lengths of both buffers (int64). Processors
    of the supported kind (x86-64) store eight bytes at once, and show stores to other processes in their order.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = mmap.mmap(fd, _BYTES)
        self._header = memoryview(self._bytes)[:_HEADER_BYTES].cast("q")

    @classmethod
    def create(cls) -> WorkerMemory:
        """Memory without a message. It ends with the last process that has it."""
        fd = os.memfd_create("cascade-worker")
        os.ftruncate(fd, _BYTES)
        return cls(fd)

    @property
    def number(self) -> int:
        """The number of the newest message; 0 without one."""
        return self._header[0]

    def write(self, message: bytes) -> None:
        """Replaces the message; raises ValueError for more than MESSAGE_BYTES_MAX."""
        if len(message) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(message)} bytes; at most {MESSAGE_BYTES_MAX} fit")
        number = self.number + 1
        start = _start(number)
        self._bytes[start : start + len(message)] = message
        self._header[1 + number % 2] = len(message)
        self._header[0] = number

    def read(self) -> bytes:
        """The newest message, whole; empty without one."""
        while number := self.number:
            start = _start(number)
            message = self._bytes[start : start + self._header[1 + number % 2]]
            # the writer fills the other buffer first, so a message with the same number was not touched
            if self.number == number:
                return message
        return b""

    def clear(self) -> None:
        """Removes the message of a process that ended."""
        self._header[0] = 0


def _start(number: int) -> int:
    return _HEADER_BYTES + number % 2 * MESSAGE_BYTES_MAX
