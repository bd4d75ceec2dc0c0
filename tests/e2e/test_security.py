"""TLS and SASL through our own clients, against a real broker with certificates that are made here."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from bench.embedded import new_names
from cascade import cli
from cascade.config import ClientName, KafkaSettings, SecuritySettings
from cascade.errors import BrokerError
from streaming.kafka import TopicSpec, ensure_topics, make_consumer, make_producer, wait_for_broker
from tests.certificates import Authority, make_authority
from tests.shared_parts import PASSWORD, SASL_LISTENERS, SharedBroker, SharedParts
from tests.token_server import token_server, unsigned_token

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

WRONG_PASSWORD = "wr0ngHorse"
# a refusal is reported at once: a single attempt, no waiting for the time given (60 s below) to run out
AT_ONCE_S = 20.0


@dataclass(frozen=True)
class Secured:
    broker: SharedBroker
    ours: Authority
    theirs: Authority
    client: ClientName = "librdkafka"

    def kafka(self, listener: str, host: str = "localhost", **security: str) -> KafkaSettings:
        """Settings for a listener, with the authority that has signed the broker's certificate."""
        protocol = "SASL_SSL" if listener in SASL_LISTENERS else "SSL"
        if listener in SASL_LISTENERS:
            security = {"sasl_mechanism": SASL_LISTENERS[listener]} | security
        return KafkaSettings(
            client=self.client,
            bootstrap=self.broker.secure_bootstrap[listener].replace("localhost", host),
            group=f"g-{uuid.uuid4().hex}",
            security=SecuritySettings(protocol=protocol, **({"ca_file": str(self.ours.ca_file)} | security)),  # type: ignore[arg-type]
        )


@pytest.fixture(params=["librdkafka", "kafka-python"])
def secured(secured_broker: Secured, request: pytest.FixtureRequest) -> Secured:
    return replace(secured_broker, client=request.param)


@pytest.fixture(scope="module")
def secured_broker(shared_parts: SharedParts, tmp_path_factory: pytest.TempPathFactory) -> Secured:
    broker = shared_parts.broker()
    return Secured(broker, broker.authority, make_authority(tmp_path_factory.mktemp("theirs")))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    monkeypatch.setenv("WRONG_PASSWORD", WRONG_PASSWORD)


def round_trip(kafka: KafkaSettings) -> None:
    """Waits, makes a topic, and produces and consumes a record: alone, and with librdkafka in a transaction too."""
    wait_for_broker(kafka, 30, pytest.fail)
    topic = f"t-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(topic, 1)])
    producer = make_producer(kafka)
    producer.send(topic, b"k", b"alone")
    producer.flush(20)
    producer.close(5)
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], lambda partitions: None, lambda partitions: None)
        values: list[bytes | None] = []
        deadline_s = time.monotonic() + 60
        while not values and time.monotonic() < deadline_s:
            values += [value for batch in consumer.poll(0.1, 100) for value in batch.values]
        assert values == [b"alone"]
        if kafka.client == "kafka-python":
            return
        transactions = make_producer(kafka, f"tx-{topic}")
        transactions.begin()
        transactions.send(topic, b"k", b"in a transaction")
        transactions.commit({(topic, 0): (1, "m")}, consumer.member())
        transactions.close(5)
        while len(values) < 2 and time.monotonic() < deadline_s:
            values += [value for batch in consumer.poll(0.1, 100) for value in batch.values]
        assert values == [b"alone", b"in a transaction"]
        assert consumer.committed([(topic, 0)]) == {(topic, 0): (1, "m")}


def refused(kafka: KafkaSettings) -> str:
    """The one line of a refusal, which comes at once; kafka-python itself retries until its time is over."""
    lines = []
    attempts: list[Callable[[], object]] = [lambda: wait_for_broker(kafka, 60, lambda line: None)]
    if kafka.client == "librdkafka":
        attempts += [lambda: make_consumer(kafka, kafka.group), lambda: make_producer(kafka)]
    for attempt in attempts:
        started_s = time.monotonic()
        with pytest.raises(BrokerError) as caught:
            attempt()
        assert time.monotonic() - started_s < AT_ONCE_S
        lines.append(str(caught.value))
        assert "\n" not in lines[-1]
        assert "kafka.security" in lines[-1]
    return lines[0]


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def test_kafka_python_itself_does_not_say_what_was_refused(
    secured_broker: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.BOOTSTRAP_TIMEOUT_S", 2.0)
    kafka = replace(secured_broker, client="kafka-python").kafka(
        "PLAIN", username="cascade", password_env="WRONG_PASSWORD"
    )
    with pytest.raises(BrokerError, match="connecting") as caught:
        make_producer(kafka)
    assert "\n" not in str(caught.value)
    assert WRONG_PASSWORD not in str(caught.value)


def test_tls_with_the_right_authority(secured: Secured) -> None:
    round_trip(secured.kafka("TLS"))


def test_a_certificate_of_another_authority_is_refused(secured: Secured) -> None:
    assert "certificate verify failed" in refused(secured.kafka("TLS", ca_file=str(secured.theirs.ca_file)))


def test_a_certificate_for_another_host_is_refused(secured: Secured) -> None:
    line = refused(secured.kafka("TLS", host="127.0.0.1"))
    assert "certificate verify failed" in line
    assert "127.0.0.1" in line


def test_mutual_tls_with_the_clients_certificate(secured: Secured) -> None:
    certificate, key = secured.ours.issue("client", [])
    round_trip(secured.kafka("MUTUAL", certificate_file=str(certificate), key_file=str(key)))


def test_mutual_tls_is_refused_without_a_certificate_and_with_anothers(secured: Secured) -> None:
    assert "CERTIFICATE" in refused(secured.kafka("MUTUAL")).upper()
    certificate, key = secured.theirs.issue("stranger", [])
    assert refused(secured.kafka("MUTUAL", certificate_file=str(certificate), key_file=str(key)))


@pytest.mark.parametrize("listener", ["SCRAMA", "SCRAMB", "PLAIN"])
def test_user_name_and_password(secured: Secured, listener: str, all_logs: pytest.LogCaptureFixture) -> None:
    round_trip(secured.kafka(listener, username="cascade", password_env="KAFKA_PASSWORD"))
    assert PASSWORD not in all_logs.text


@pytest.mark.parametrize("listener", ["SCRAMA", "SCRAMB", "PLAIN"])
def test_a_wrong_password_is_refused_at_once_and_shown_nowhere(
    secured: Secured, listener: str, all_logs: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(secured.kafka(listener, username="cascade", password_env="WRONG_PASSWORD"))
    assert "uthentication failed" in line
    output = capfd.readouterr()
    for text in (line, all_logs.text, output.out, output.err):
        assert WRONG_PASSWORD not in text


def test_a_mechanism_that_the_broker_does_not_offer_is_refused(secured: Secured) -> None:
    line = refused(
        secured.kafka("PLAIN", sasl_mechanism="SCRAM-SHA-512", username="cascade", password_env="KAFKA_PASSWORD")
    )
    assert "SASL" in line.upper()


def test_a_token_from_a_file(secured: Secured, tmp_path: Path, all_logs: pytest.LogCaptureFixture) -> None:
    file, token = tmp_path / "token", unsigned_token("cascade", 600)
    file.write_text(token + "\n")
    round_trip(secured.kafka("TOKEN", token_file=str(file)))
    assert token not in all_logs.text


def test_a_token_that_has_expired_is_refused(secured: Secured, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(unsigned_token("cascade", -600))
    assert "invalid_token" in refused(secured.kafka("TOKEN", token_file=str(file)))


def test_a_token_of_an_oauth_server(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, all_logs: pytest.LogCaptureFixture
) -> None:
    with token_server() as server:
        monkeypatch.setenv("CLIENT_SECRET", server.secret)
        kafka = secured.kafka(
            "TOKEN", token_endpoint=server.url, client_id="cascade", client_secret_env="CLIENT_SECRET", scope="kafka"
        )
        round_trip(kafka)
        monkeypatch.setenv("CLIENT_SECRET", WRONG_PASSWORD)
        assert "invalid_client" in refused(kafka)
    assert server.secret not in all_logs.text
    assert WRONG_PASSWORD not in all_logs.text


def test_the_topics_of_a_secure_broker_are_created_by_the_command(
    secured: Secured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka = msgspec.to_builtins(secured.kafka("SCRAMB", username="cascade", password_env="KAFKA_PASSWORD"))
    path = tmp_path / "cascade.toml"
    path.write_bytes(msgspec.toml.encode({"kafka": kafka | new_names()}))
    arguments = ["topics", "--config", str(path), "--partitions", "2", "--wait", "60"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("created") == 4
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("there") == 4
