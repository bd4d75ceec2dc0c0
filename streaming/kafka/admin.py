"""An admin connection: librdkafka's for either client, since it reports an access error at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from cascade.config import KafkaSettings
from streaming.kafka.access_errors import is_access_error
from streaming.kafka.rdkafka_settings import Connection, connection_settings

ATTEMPT_TIMEOUT_S = 20.0
# The binding calls back with an access error only while no other call waits.
_ASK_S = 1.0
_RETRIABLE = (
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._WAIT_COORD,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.NOT_CONTROLLER,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
)


@contextlib.contextmanager
def admin_client(kafka: KafkaSettings, action: str, timeout_s: float = ATTEMPT_TIMEOUT_S) -> Iterator[AdminClient]:
    """An admin client that has reached a broker; raises librdkafka's errors as BrokerError with the action.

    Raises BrokerError too if no broker answers within `timeout_s`, and at once for refused credentials or certificates.
    """
    connection = Connection(kafka)
    refusals: list[KafkaError] = []

    def on_error(error: KafkaError) -> None:
        if is_access_error(error):
            refusals.append(error)

    with connection.translated(action):
        admin = AdminClient(connection_settings(kafka, "cascade-admin", on_error))
        give_up_s = time.monotonic() + timeout_s
        while (problem := _problem(admin, min(_ASK_S, timeout_s))) is not None:
            admin.poll(0)
            if refusals or time.monotonic() > give_up_s:
                raise KafkaException(refusals[0] if refusals else problem)
        yield admin


def is_retriable(error: BaseException | None) -> bool:
    """Whether a later request may succeed after this error of an admin client: a broker is away, or just started."""
    return isinstance(error, KafkaException) and error.args[0].code() in _RETRIABLE


def _problem(admin: AdminClient, timeout_s: float) -> KafkaError | None:
    try:
        admin.list_topics("", timeout=timeout_s)
    except KafkaException as error:
        return error.args[0]
    return None
