"""An asyncio loop in a thread of its own, for callers in other threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TypeVar

from cascade.errors import DeepStageError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads until `close`, in the process that created it. `name`: for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._owner_pid = os.getpid()
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, work: Coroutine[object, object, T]) -> Future[T]:
        """Start a coroutine. Its future fails with DeepStageError if the loop is closed before the coroutine ends."""
        with self._closing:
            problem = self._problem()
            if problem is None:
                return asyncio.run_coroutine_threadsafe(self._guard(work), self._loop)
        work.close()
        failed: Future[T] = Future()
        failed.set_exception(problem)
        return failed

    def start(self, work: Callable[[Future[T]], None]) -> Future[T]:
        """Call `work` on the loop, with the future that is returned and that it completes, at once or later.

        It costs a third of a coroutine. The future fails with DeepStageError if the loop is closed already, and with
        what `work` raises. What `work` leaves open at the end of the loop is the caller's to complete.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # nobody but `work` may complete it
        with self._closing:
            problem = self._problem()
            if problem is None:
                self._loop.call_soon_threadsafe(_run_guarded, work, future)
                return future
        future.set_exception(problem)
        return future

    def closed_error(self) -> DeepStageError:
        """The error of work that the end of the loop leaves open."""
        return DeepStageError("error", f"{self._name} was closed")

    def _problem(self) -> DeepStageError | None:
        if os.getpid() != self._owner_pid:
            return DeepStageError("error", f"{self._name} was created before a fork; create it in this process")
        return DeepStageError("error", f"{self._name} is closed") if self._closed else None

    async def _guard(self, work: Coroutine[object, object, T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._closed:
                raise self.closed_error() from None
            raise

    def close(self, last: Callable[[], Coroutine[object, object, object]] | None = None) -> None:
        """Cancel all work, run `last` on the loop, end loop and thread. Further calls have no effect."""
        with self._closing:
            if self._closed or os.getpid() != self._owner_pid:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._wind_down(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_down(self, last: Callable[[], Coroutine[object, object, object]] | None) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if last is not None:
            await last()


def _run_guarded(work: Callable[[Future[T]], None], future: Future[T]) -> None:
    try:
        work(future)
    except Exception as error:
        future.set_exception(error)
