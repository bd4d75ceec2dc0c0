"""A client of librdkafka (rd_kafka_t): made from settings, with its callbacks, and destroyed at its end."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_void_p
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from streaming.kafka.rdkafka_library import (
    CONF_OK,
    DESTROY_WITHOUT_LEAVING,
    ERROR_BYTES,
    ERROR_CALLBACK,
    TOKEN_CALLBACK,
    check,
    check_error,
    decoded,
    milliseconds,
    rdkafka,
)


class Handle:
    """The owner of an rd_kafka_t, which ends with `destroy` or with the last reference to this object.

    Every method raises KafkaException. `address`: of the rd_kafka_t.
    """

    def __init__(
        self,
        kind: int,
        settings: Mapping[str, Any],
        configure: Callable[[Any], object] = lambda configuration: None,
        kept: object = None,
    ) -> None:
        """Makes a client; does not wait for a broker.

        kind: PRODUCER or CONSUMER. settings: by librdkafka's names, and the binding's `error_cb` and `oauth_cb`.
        configure: called with the address of the rd_kafka_conf_t. kept: what the client's callbacks use.
        """
        callbacks: list[Any] = [ERROR_CALLBACK(_error_callback(settings["error_cb"]))]
        configuration = _configuration(settings)
        rdkafka.conf_set_error_cb(configuration, callbacks[0])
        # relevant problems are reported as errors too
        rdkafka.conf_set_log_cb(configuration, None)
        token = settings.get("oauth_cb")
        if token is not None:
            callbacks.append(TOKEN_CALLBACK(_token_callback(token)))
            rdkafka.conf_set_oauthbearer_token_refresh_cb(configuration, callbacks[-1])
            rdkafka.conf_enable_sasl_queue(configuration, 1)
        configure(configuration)
        reason = ctypes.create_string_buffer(ERROR_BYTES)
        address = rdkafka.new(kind, configuration, reason, ERROR_BYTES)
        if address is None:
            rdkafka.conf_destroy(configuration)
            raise KafkaException(KafkaError(KafkaError._INVALID_ARG, decoded(reason.value)))
        self.address: int = address
        self._topics: dict[str, int] = {}
        self._queues: list[int] = []
        self._calls, self._counting = 0, threading.Lock()
        used = ctypes.py_object((callbacks, kept))
        # a client that is not destroyed calls back until the process ends, when the interpreter drops all else
        ctypes.pythonapi.Py_IncRef(used)
        self._end = weakref.finalize(self, _destroy, address, self._topics, self._queues, used)
        if token is not None:
            # in a thread of librdkafka: a client that nobody polls needs new tokens too
            check_error(rdkafka.sasl_background_callbacks_enable(address))

    def destroy(self) -> None:
        """Ends the client, without waiting for records or for the group; the object must not be used any more.

        A client with a call that has not returned ends with the last reference to it, which that call has.
        """
        if self._end.atexit:
            self._end()

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """A call of librdkafka, in a thread that may be left behind: the client must not be destroyed under it."""
        with self._counting:
            self._calls += 1
            self._end.atexit = False
        try:
            yield
        finally:
            with self._counting:
                self._calls -= 1
                # a later call may return before an earlier one
                self._end.atexit = not self._calls

    def leave_behind(self) -> None:
        """Never ends the client, since that would wait without an end."""
        self._end.detach()

    def ask_metadata(self, timeout_s: float) -> None:
        """Waits for the answer of a broker."""
        found = c_void_p()
        check(rdkafka.metadata(self.address, 0, None, ctypes.byref(found), milliseconds(timeout_s)))
        rdkafka.metadata_destroy(found)

    def poll(self) -> None:
        """Calls back for the errors since the last call."""
        rdkafka.poll(self.address, 0)

    def topic(self, name: str) -> int:
        """The handle of a topic (rd_kafka_topic_t), which lives as long as the client."""
        handle = self._topics.get(name)
        if handle is None:
            handle = rdkafka.topic_new(self.address, name.encode(), None)
            if handle is None:
                raise KafkaException(KafkaError(KafkaError._INVALID_ARG, f"no topic can have the name {name!r}"))
            self._topics[name] = handle
        return handle

    def topic_name(self, handle: int) -> str:
        """The name of a topic that `topic` has returned, by its handle."""
        return next((name for name, found in self._topics.items() if found == handle), "an unknown topic")

    def consumer_queue(self) -> int:
        """The queue of messages, rebalances and errors (rd_kafka_queue_t), which lives as long as the client."""
        check(rdkafka.poll_set_consumer(self.address))
        self._queues.append(rdkafka.queue_get_consumer(self.address))
        return self._queues[-1]

    def new_queue(self) -> int:
        """A queue (rd_kafka_queue_t) for the client's events, which lives as long as the client."""
        self._queues.append(rdkafka.queue_new(self.address))
        return self._queues[-1]

    def fatal_error(self) -> KafkaException | None:
        """The error after which this client does nothing more, if there was one."""
        reason = ctypes.create_string_buffer(ERROR_BYTES)
        code = rdkafka.fatal_error(self.address, reason, ERROR_BYTES)
        return KafkaException(KafkaError(code, decoded(reason.value), fatal=True)) if code else None


def _configuration(settings: Mapping[str, Any]) -> int:
    made: int = rdkafka.conf_new()
    reason = ctypes.create_string_buffer(ERROR_BYTES)
    for name, value in settings.items():
        # the binding's settings, which are no text
        if name in {"error_cb", "oauth_cb", "logger"}:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if rdkafka.conf_set(made, name.encode(), text.encode(), reason, ERROR_BYTES) != CONF_OK:
            rdkafka.conf_destroy(made)
            raise KafkaException(KafkaError(KafkaError._INVALID_ARG, decoded(reason.value)))
    return made


def _destroy(address: int, topics: dict[str, int], queues: list[int], used: ctypes.py_object[Any]) -> None:
    """`used`: by the client's callbacks, until its threads have ended."""
    for handle in topics.values():
        rdkafka.topic_destroy(handle)
    for queue in queues:
        rdkafka.queue_destroy(queue)
    rdkafka.destroy_flags(address, DESTROY_WITHOUT_LEAVING)
    ctypes.pythonapi.Py_DecRef(used)


def _error_callback(report: Callable[[KafkaError], None]) -> Callable[..., None]:
    def called(client: int, code: int, reason: bytes | None, opaque: int | None) -> None:
        report(KafkaError(code, decoded(reason)))

    return called


def _token_callback(provide: Callable[[str], tuple[str, float]]) -> Callable[..., None]:
    def called(client: int, settings: bytes | None, opaque: int | None) -> None:
        reason = ctypes.create_string_buffer(ERROR_BYTES)
        try:
            token, expiry_s = provide("")
        except Exception as error:  # librdkafka reports it and asks again
            rdkafka.oauthbearer_set_token_failure(client, str(error).encode())
            return
        expiry_ms = int(expiry_s * 1_000)
        if rdkafka.oauthbearer_set_token(client, token.encode(), expiry_ms, b"", None, 0, reason, ERROR_BYTES):
            rdkafka.oauthbearer_set_token_failure(client, reason.value)

    return called
