"""The service's configuration file, `cascade.toml`: its sections, their defaults and limits, and the loader.

Paths are relative to the working directory of the service. The file contains no secrets: it names the environment
variable or the file that contains a secret, and the service reads the secret when it creates the client.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cascade.addresses import parse_addresses
from cascade.errors import SettingError
from cascade.plugins import CLIENTS, CODECS, DEEP_STAGES, METERS
from cascade.setting_files import parse_settings, read_setting_file

# Names of registered parts, see cascade.plugins; `load_config` checks that they exist.
PartName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
CodecName = PartName
ClientName = PartName
Backend = PartName
SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
OptionalText = Annotated[str, msgspec.Meta(max_length=1024)]
TopicName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
_SECRET_BYTES_MAX = 4096
# With a shorter key, an attacker who knows one card id and its hash could find the key by trying all keys.
HASH_KEY_CHARACTERS_MIN = 16
# The file name of a SettingError until `with_config_path` replaces it.
_UNKNOWN_PATH = "configuration"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_INSTANCE = re.compile(r"[a-zA-Z0-9._-]{1,200}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class BundleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[bundle]`: the directory of the bundle (models, features, schema and policy) that the service uses."""

    path: Text = "bundle"


class TopicSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.topics]`: the names of the topics. Only services with `terminals.share` use `summaries`."""

    transactions: TopicName = "transactions"
    labels: TopicName = "labels"
    decisions: TopicName = "decisions"
    dead_letters: TopicName = "dead-letters"
    summaries: TopicName = "terminal-summaries"


class SecuritySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.security]`: TLS and SASL between the service and the brokers. An empty text means that a key is not set.

    A key that ends in `_env` names an environment variable with the secret; a secret's `_file` has it as its only line.

    - `ca_file`: authority that signed the brokers' certificates (PEM), and that of `token_endpoint`.
    - `certificate_file`, `key_file`, `key_password_env`: the client's own certificate (PEM), for mutual TLS.
    - `username`, `password_env`, `password_file`: the user, for every SASL mechanism except OAUTHBEARER.
    - `token_file`: for OAUTHBEARER, a file whose only line is the token. The client reads it at each connection.
    - `token_endpoint`: for OAUTHBEARER, the URL of an OAuth server that issues the tokens.
    - `client_id`, `client_secret_env`, `client_secret_file`, `scope`: what the client sends to `token_endpoint`.
    """

    protocol: SecurityProtocol = "PLAINTEXT"
    ca_file: OptionalText = ""
    certificate_file: OptionalText = ""
    key_file: OptionalText = ""
    key_password_env: OptionalText = ""
    sasl_mechanism: SaslMechanism = "SCRAM-SHA-512"
    username: OptionalText = ""
    password_env: OptionalText = ""
    password_file: OptionalText = ""
    token_file: OptionalText = ""
    token_endpoint: OptionalText = ""
    client_id: OptionalText = ""
    client_secret_env: OptionalText = ""
    client_secret_file: OptionalText = ""
    scope: OptionalText = ""

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.protocol in ("SSL", "SASL_SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether the client authenticates with SASL: with user name and password, or with a token."""
        return self.protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    @property
    def uses_tokens(self) -> bool:
        """Whether the client authenticates with a token."""
        return self.uses_sasl and self.sasl_mechanism == "OAUTHBEARER"

    def password(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Read the SASL password; None if none is configured. Raises SettingError if it cannot be read."""
        return _read_secret(self, "kafka.security", "password", environment)

    def client_secret(self, environment: Mapping[str, str] = os.environ) -> str:
        """Read the secret of `client_id`. Raises SettingError if it cannot be read or is not configured."""
        _check_exactly_one(self, "kafka.security", "client_secret_env", "client_secret_file", "the client's secret")
        return _read_secret(self, "kafka.security", "client_secret", environment) or ""

    def key_password(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Read the password of `key_file`; None if none is configured. Raises SettingError if it cannot be read."""
        return _read_secret(self, "kafka.security", "key_password", environment)


class SchemaRegistrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.schema_registry]`: where the codec `avro` finds the schemas whose numbers the messages carry.

    An empty text means that a key is not set. Exactly one of `url` and `directory` is set.

    - `url`: a registry with Confluent's REST API.
    - `directory`: a directory with a file `{number}.avsc` for each schema.
    - `ca_file`: authority that signed the registry's certificate (PEM).
    - `certificate_file`, `key_file`: the client's own certificate (PEM), for mutual TLS.
    - `username`, `password_env`, `password_file`: the user; an environment variable or a file's only line has the
      password.
    """

    url: OptionalText = ""
    directory: OptionalText = ""
    ca_file: OptionalText = ""
    certificate_file: OptionalText = ""
    key_file: OptionalText = ""
    username: OptionalText = ""
    password_env: OptionalText = ""
    password_file: OptionalText = ""

    def password(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Read the password of `username`; None if none is configured. Raises SettingError if it cannot be read."""
        return _read_secret(self, "kafka.schema_registry", "password", environment)


class KafkaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka]`: brokers, client library, consumer group, codec and topics.

    - `bootstrap`: addresses of brokers, `host:port`, separated by commas.
    - `client`: the client library, by its name in `cascade.plugins`. `kafka-python` does less and is slower:
      docs/scaling.md compares them.
    - `instance`: makes the worker a static member of the group. The name is unique in the group and the same at each
      start (for example the name of a pod). A restarted worker returns to its partitions without a rebalance, and the
      broker fences what is left of the previous run. Empty: the worker is a dynamic member.
    - `instance_env`: the same, from this environment variable: workers that share a configuration file, such as the
      pods of a StatefulSet, have names of their own.
    - `lost`: what the worker does when it loses the broker or the broker refuses its records: `retry` closes every
      connection and resumes from the committed offsets; `exit` ends the process.
    - `lost_s_max`: seconds without progress after which `retry` ends the process.
    """

    bootstrap: Text = "127.0.0.1:9092"
    client: ClientName = "librdkafka"
    group: Text = "cascade"
    instance: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{0,200}$")] = ""
    instance_env: OptionalText = ""
    codec: CodecName = "json"  # by its name in cascade.plugins
    lost: Literal["retry", "exit"] = "retry"
    lost_s_max: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 300.0
    topics: TopicSettings = TopicSettings()
    security: SecuritySettings = SecuritySettings()
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()

    @property
    def uses_schemas(self) -> bool:
        """Whether the codec reads schemas from `schema_registry`. Raises SettingError if it cannot be imported."""
        if self.codec in CODECS.own:
            return self.codec == "avro"
        return bool(getattr(CODECS.load(self.codec), "uses_schemas", False))

    @property
    def servers(self) -> list[str]:
        """The bootstrap addresses as a list."""
        return [server.strip() for server in self.bootstrap.split(",") if server.strip()]


class DeepSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[deep]`: where the deep model runs.

    - `backend`: `triton`, a Triton server; `onnxruntime`, ONNX Runtime in the worker's own process; or another name in
      `cascade.plugins`.
    - `url`, `model`: Triton's gRPC addresses (`host:port`, separated by commas), and the model's name there. Each
      address of a host name is a replica.
    - `tls`, `ca_file`, `certificate_file`, `key_file`: TLS between worker and Triton (PEM files).
    - `threads`, `device`: CPU threads of ONNX Runtime in process, and where it computes (`cuda`: a GPU).
    - `hedge_ms`: after so long without an answer the worker sends the call a second time and takes the first answer. 0
      turns this off.
    - `start_wait_s_max`: how long a starting worker waits for the model. After that the screener decides the escalated
      transactions until the model answers.
    """

    backend: Backend = "triton"
    url: Text = "127.0.0.1:8001"
    model: Text = "fraud_deep"
    tls: bool = False
    ca_file: OptionalText = ""
    certificate_file: OptionalText = ""
    key_file: OptionalText = ""
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    device: Literal["cpu", "cuda"] = "cpu"
    hedge_ms: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 0.0
    start_wait_s_max: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 60.0

    @property
    def servers(self) -> list[tuple[str, int]]:
        """Host and port of each address in `url`."""
        return parse_addresses(self.url)


class DeadlineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[deadline]`: the time within which an escalated transaction is decided, in ms.

    - `start`: when the time begins: `append`, at the timestamp of the record; `fetch`, when the worker fetches the
      record (for a backlog, whose timestamps are long past). Then no more records are fetched while the deep model
      would need half of the time for those that wait, so that it keeps up with the backlog.
    """

    budget_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 50
    start: Literal["append", "fetch"] = "append"


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[breaker]`: the circuit breaker of the deep model.

    It opens for `pause_ms` when `failures_share` of the last `calls` deep calls failed or were late. Each failed trial
    call after a pause doubles the pause, up to `pause_ms_max`.
    """

    calls: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 20
    failures_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    pause_ms: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 500
    pause_ms_max: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 10_000


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[worker]`: the number of workers, and the bounds of each.

    - `processes`: workers that `cascade run` starts in one consumer group. The bounds below, and the limits of the
      feature state, apply to each worker.
    - `standby`: with several workers, one more process has everything loaded and replaces a worker that ends; it takes
      memory, but no CPU time while it waits.
    - `batch_rows_max`: rows of a micro-batch.
    - `in_flight_max`: escalated transactions in flight; at more, the worker pauses its partitions.
    - `in_flight_card_max`: escalated transactions of one card in flight; at more, the screener decides them
      (`queue-full`), so that a flood of one card does not delay other cards.
    - `commit_interval_ms`: time between commits with at-least-once delivery.
    - `transaction_interval_ms`: the same with exactly-once delivery; decisions become visible at the commit.
    - `transaction_ms_min`: where no other record waits, the commit does not wait for the interval, but comes no sooner
      after the last one.
    - `revoke_timeout_ms`, `drain_timeout_ms`: time to finish what is in flight after a rebalance revokes partitions,
      and after SIGTERM.
    - `message_bytes_max`: the worker dead-letters larger messages.
    - `ahead_ms_max`: the worker dead-letters events that are further ahead of their record's timestamp.
    - `lock_memory`: the worker locks its memory, so that no feature state is swapped out. The system must allow it.
    """

    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    standby: bool = True
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 1_024
    in_flight_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4_096
    in_flight_card_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 64
    commit_interval_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 500
    transaction_interval_ms: Annotated[int, msgspec.Meta(ge=5, le=10_000)] = 100
    transaction_ms_min: Annotated[int, msgspec.Meta(ge=5, le=10_000)] = 5
    # far below the five minutes after which the group removes a silent member
    revoke_timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 5_000
    # below Kubernetes' grace period of 30 s, with time left to commit and leave the group
    drain_timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=600_000)] = 20_000
    poll_timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 500
    message_bytes_max: Annotated[int, msgspec.Meta(ge=64, le=1_048_576)] = 65_536
    ahead_ms_max: Annotated[int, msgspec.Meta(ge=0, le=31_536_000_000)] = 3_600_000
    lock_memory: bool = False


class LabelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[labels]`: when labels take effect.

    - `alignment`: with `arrival`, when the worker receives them. With `exact`, the worker reads the labels topic up to
      its end before it scores a batch: runs are reproducible, at one round trip to the broker per batch.
    """

    alignment: Literal["arrival", "exact"] = "arrival"


class StateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[state]`: snapshots of the feature state.

    - `snapshots`: a directory, or a URL of an object store (through fsspec). Empty: the worker writes no snapshots, and
      each start replays the topics from their beginning.
    - `interval_s`: time between two snapshots.
    - `keep`: number of snapshots that stay; at least two, since the newest may be damaged or ahead of the committed
      offsets.
    """

    snapshots: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=86_400)] = 60.0
    keep: Annotated[int, msgspec.Meta(ge=2, le=100)] = 3


class DuplicateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[duplicates]`: a repeated transaction gets its first decision again, marked `duplicate`.

    A repeat has the id, card, amount and partition of an earlier transaction.

    - `window_s`: seconds (of record timestamps) after the first transaction in which repeats are found; 0: none are.
    - `ids_max`: ids that a worker remembers; beyond that it forgets the oldest.
    """

    window_s: Annotated[float, msgspec.Meta(ge=0, le=604_800)] = 600.0
    ids_max: Annotated[int, msgspec.Meta(ge=1_024, le=67_108_864)] = 262_144


class OverloadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[overload]`: a worker whose deep stage is saturated escalates fewer transactions.

    It is saturated while more than `in_flight_share` of `worker.in_flight_max` are in flight, or more than `late_share`
    of the escalated transactions are degraded with cause `deadline` or `queue-full`. After every `after_s` seconds of
    saturation the escalation budget is multiplied by `factor_step`, but it stays at least `factor_min` times the
    bundle's; after every `calm_s` seconds without saturation it is divided by `factor_step`. With a `factor_min` of 1
    it never changes, and neither does a budget of 1, which escalates everything.
    """

    factor_min: Annotated[float, msgspec.Meta(ge=0.001, le=1)] = 0.0625
    factor_step: Annotated[float, msgspec.Meta(ge=0.1, le=0.95)] = 0.5
    in_flight_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    late_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    after_s: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 2.0
    calm_s: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 10.0


class TerminalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[terminals]`: terminal features with several workers, of which each reads only some partitions.

    - `share`: the workers exchange summaries of their terminals through `kafka.topics.summaries`. Without it, a
      worker's terminal features count only the transactions of its own partitions.
    - `interval_s`: time between two summaries; the transactions of other workers are counted that much later.
    - `bucket_s`: event time that a summary covers; the transactions of other workers leave a window by whole buckets.
    """

    share: bool = False
    interval_s: Annotated[float, msgspec.Meta(ge=0.05, le=3_600)] = 5.0
    bucket_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 3_600


class PrivacySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[privacy]`: with `hash_card`, keyed hashes replace the card ids before these reach state, logs or topics.

    The key is in the environment variable that `key_env` names, or is the only line of `key_file`. It has at least 16
    characters and is the same for every worker and every start.
    """

    hash_card: bool = False
    key_env: OptionalText = ""
    key_file: OptionalText = ""

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Read the key; None without `hash_card`. Raises SettingError if it cannot be read or is too short."""
        if not self.hash_card:
            return None
        _check_exactly_one(self, "privacy", "key_env", "key_file", "the key")
        key = _read_secret(self, "privacy", "key", environment)
        if key is not None and len(key) < HASH_KEY_CHARACTERS_MIN:
            name = "privacy.key_env" if self.key_env else "privacy.key_file"
            problem = f"that key has fewer than {HASH_KEY_CHARACTERS_MIN} characters"
            raise _error(name, None, problem, "make one with `openssl rand -hex 32`")
        return key


class SlaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[sla]`: limits on the p99 latency in ms, and on the share of decisions that are degraded."""

    screened_p99_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 5.0
    escalated_p99_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 20.0
    degraded_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.001


class EnergySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[energy]`: the inputs of modelled joules, which the ledger uses where the hardware has no counter.

    - `watts_per_core`: modelled joules are CPU seconds × this figure.
    - `processor`: a row of the table of processors (docs/energy.md); its watts per hardware thread replace the figure.
    - `idle_watts_per_core`, `gpu_idle_watts`: power of a reserved core and of a GPU without work; 0: not stated.
    - `meters`: names of registered meters (`cascade.plugins`), besides those of the hardware that Cascade finds itself.
    """

    # 225 W of thermal design power over the 32 hardware threads of a mid-range server CPU, rounded. Operators replace
    # it with their own figure; ratios between runs do not depend on it.
    watts_per_core: Annotated[float, msgspec.Meta(gt=0, le=1_000)] = 7.0
    processor: OptionalText = ""
    idle_watts_per_core: Annotated[float, msgspec.Meta(ge=0, le=1_000)] = 0.0
    gpu_idle_watts: Annotated[float, msgspec.Meta(ge=0, le=2_000)] = 0.0
    meters: Annotated[tuple[PartName, ...], msgspec.Meta(max_length=16)] = ()


class CarbonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[carbon]`: what converts joules to gCO2e. Without `region` or `file` the ledger has no carbon.

    - `region`: ISO 3166-1 alpha-3 code of a country, whose yearly average intensity applies.
    - `file`, `kind`: intensities by the hour, which replace the average, and whether they are average or marginal.
    - `pue`: power usage effectiveness of the data centre.
    - `embodied_kg`: emissions of manufacturing the hardware, in kgCO2e. `reserved_share` of them belongs to this
      service, spread over `life_years`.
    """

    region: OptionalText = ""
    file: OptionalText = ""
    kind: Literal["average", "marginal"] = "average"
    pue: Annotated[float, msgspec.Meta(ge=1, le=5)] = 1.54
    embodied_kg: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    reserved_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    life_years: Annotated[float, msgspec.Meta(gt=0, le=50)] = 4.0


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[ledger]`: the ledger's journal on disk; with an empty `directory` there is none.

    The service appends a line every `interval_s` seconds. It begins a new file when the present one exceeds
    `file_mb_max`, and deletes the oldest beyond `files_max`.
    """

    directory: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60.0
    file_mb_max: Annotated[float, msgspec.Meta(gt=0, le=4_096)] = 32.0
    files_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64


class OtelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[otel]`: export of the ledger's metrics to an OpenTelemetry collector; without an `endpoint` there is none.

    - `endpoint`: the whole URL of OTLP over HTTP, for example `http://127.0.0.1:4318/v1/metrics`.
    - `ca_file`: authority that signed the collector's certificate (PEM).
    - `headers_env`, `headers_file`: an environment variable, or a file of one line, with headers in the form of
      OTEL_EXPORTER_OTLP_HEADERS: `name=value`, separated by commas, values percent-encoded.
    """

    endpoint: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=1, le=3_600)] = 60.0
    headers_env: OptionalText = ""
    headers_file: OptionalText = ""
    ca_file: OptionalText = ""

    def headers(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Read the headers, by name. Raises SettingError if they are configured and cannot be read."""
        text = _read_secret(self, "otel", "headers", environment)
        headers = {}
        for pair in text.split(",") if text is not None else []:
            name, _, value = (part.strip() for part in pair.partition("="))
            value = urllib.parse.unquote(value)
            if not (_HEADER_NAME.fullmatch(name) and value and value.isascii() and value.isprintable()):
                key = "otel.headers_env" if self.headers_env else "otel.headers_file"
                remedy = "write name=value, separated by commas, special characters of a value percent-encoded"
                # no value in the message: headers are secrets
                raise _error(key, None, "these are no headers", remedy)
            headers[name] = value
        return headers


class HealthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[health]`: the address of `/` (the live page), `/healthz`, `/readyz` and `/metrics`; port 0 takes a free port.

    - `stall_s_max`: `/healthz` fails when the worker's loop, or a partition with unread records, makes no progress for
      so long. It must exceed the time of a rebalance (5 s) and of a commit (15 s).
    """

    enabled: bool = True
    stall_s_max: Annotated[float, msgspec.Meta(ge=20, le=3_600)] = 60.0
    host: Text = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 9464


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: the lowest level that the service logs, and whether it writes JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `cascade.toml`. Every section and every key has a default.

    - `delivery`: with `exactly-once`, decisions, dead letters and offsets are one Kafka transaction. With
      `at-least-once`, the worker decides again after a crash what it had not committed, with the same `decision_id`.

    >>> Config().kafka.topics.dead_letters
    'dead-letters'
    """

    delivery: Literal["at-least-once", "exactly-once"] = "at-least-once"
    bundle: BundleSettings = BundleSettings()
    kafka: KafkaSettings = KafkaSettings()
    deep: DeepSettings = DeepSettings()
    deadline: DeadlineSettings = DeadlineSettings()
    breaker: BreakerSettings = BreakerSettings()
    worker: WorkerSettings = WorkerSettings()
    labels: LabelSettings = LabelSettings()
    state: StateSettings = StateSettings()
    duplicates: DuplicateSettings = DuplicateSettings()
    overload: OverloadSettings = OverloadSettings()
    terminals: TerminalSettings = TerminalSettings()
    privacy: PrivacySettings = PrivacySettings()
    sla: SlaSettings = SlaSettings()
    energy: EnergySettings = EnergySettings()
    carbon: CarbonSettings = CarbonSettings()
    ledger: LedgerSettings = LedgerSettings()
    otel: OtelSettings = OtelSettings()
    health: HealthSettings = HealthSettings()
    log: LogSettings = LogSettings()


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Read and check a configuration file. `KAFKA_BOOTSTRAP` in the environment overrides `kafka.bootstrap`.

    `kafka.instance` is then the value of the variable that `kafka.instance_env` names.

    Raises SettingError, one line with file, key, value and remedy, if the file cannot be read or is not TOML, if a key
    is unknown, if a value has a wrong type or is out of range, or if settings contradict each other.
    """
    content = read_setting_file(path)
    with with_config_path(path):
        config = parse_settings(content, Config, _UNKNOWN_PATH, "docs/cascade.example.toml")
        bootstrap = environment.get("KAFKA_BOOTSTRAP")
        if bootstrap:
            config = msgspec.structs.replace(config, kafka=msgspec.structs.replace(config.kafka, bootstrap=bootstrap))
        config = msgspec.structs.replace(config, kafka=_with_instance(config.kafka, environment))
        _check_names(config)
        _check_kafka(config.kafka, environment)
        _check_delivery(config)
        _check_deep(config.deep)
        config.privacy.key(environment)
        _check_otel(config.otel, environment)
    return config


def check_instance(kafka: KafkaSettings) -> None:
    """Raises SettingError if the variable that `kafka.instance_env` names is not set.

    Only a worker needs its name, so `load_config`, which every command calls, does not raise this.
    """
    if kafka.instance_env and not kafka.instance:
        problem, remedy = "that environment variable is not set", "set it to a name that only this worker has"
        raise _error("kafka.instance_env", kafka.instance_env, problem, remedy)


@contextlib.contextmanager
def with_config_path(path: object) -> Iterator[None]:
    """Adds the configuration file's name to a SettingError raised by code that knows only the settings."""
    try:
        yield
    except SettingError as error:
        if error.file != _UNKNOWN_PATH:
            raise
        raise SettingError(path, error.key, error.value, error.problem, error.remedy) from error


def _error(key: str, value: object, problem: str, remedy: str) -> SettingError:
    return SettingError(_UNKNOWN_PATH, key, value, problem, remedy)


def _with_instance(kafka: KafkaSettings, environment: Mapping[str, str]) -> KafkaSettings:
    """The settings with the `instance` that the variable of `instance_env` names; without one if it is not set."""
    key, variable = "kafka.instance_env", kafka.instance_env
    if not variable:
        return kafka
    if kafka.instance:
        raise _error(key, variable, "names the worker a second time", "set either instance or instance_env")
    if not _VARIABLE_NAME.fullmatch(variable):
        raise _error(key, variable, "not the name of an environment variable", 'name one, "POD_NAME" for example')
    name = environment.get(variable, "")
    if name and not _INSTANCE.fullmatch(name):
        problem = f"that environment variable is {name[:250]!r}"
        raise _error(key, variable, problem, "use up to 200 letters, digits, dots, dashes and underscores")
    return msgspec.structs.replace(kafka, instance=name)


def _check_names(config: Config) -> None:
    CLIENTS.check(config.kafka.client)
    CODECS.check(config.kafka.codec)
    DEEP_STAGES.check(config.deep.backend)
    for name in config.energy.meters:
        METERS.check(name)
        if config.energy.meters.count(name) > 1:
            raise _error("energy.meters", name, "named twice", "name each meter once")


def _check_kafka(kafka: KafkaSettings, environment: Mapping[str, str]) -> None:
    for server in kafka.servers or [""]:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) <= 65_535:
            problem = "not host:port, or several separated by commas"
            remedy = 'write for example "127.0.0.1:9092" (KAFKA_BOOTSTRAP in the environment overrides the file)'
            raise _error("kafka.bootstrap", kafka.bootstrap, problem, remedy)
    names = [getattr(kafka.topics, key) for key in kafka.topics.__struct_fields__]
    for key, name in zip(kafka.topics.__struct_fields__, names, strict=True):
        if names.count(name) > 1:
            raise _error(f"kafka.topics.{key}", name, "names a topic twice", "give each topic a name of its own")
    _check_security(kafka.security, environment)
    _check_schema_registry(kafka, environment)


def _check_delivery(config: Config) -> None:
    if config.delivery == "exactly-once" and not CLIENTS.load(config.kafka.client).exactly_once:
        problem = "has no exactly-once delivery"
        remedy = 'set it to "librdkafka", or delivery to "at-least-once"'
        raise _error("kafka.client", config.kafka.client, problem, remedy)


def _check_security(security: SecuritySettings, environment: Mapping[str, str]) -> None:
    section = "kafka.security"
    _check_files(security, section)
    if not security.uses_tls and (security.ca_file or security.certificate_file):
        remedy = "use SSL or SASL_SSL, or remove the files"
        raise _error(f"{section}.protocol", security.protocol, "does not use the TLS files", remedy)
    if security.uses_tokens:
        _check_tokens(security, environment)
    elif security.token_file or security.token_endpoint:
        remedy = 'use SASL_SSL with "OAUTHBEARER", or remove token_file and token_endpoint'
        raise _error(f"{section}.sasl_mechanism", security.sasl_mechanism, "does not use tokens", remedy)
    elif security.uses_sasl:
        if not security.username:
            raise _error(f"{section}.username", None, "missing", f"set it; {security.protocol} needs a user name")
        _check_exactly_one(security, section, "password_env", "password_file", "the password")
    security.password(environment)
    security.key_password(environment)


def _check_tokens(security: SecuritySettings, environment: Mapping[str, str]) -> None:
    section = "kafka.security"
    for key in ("username", "password_env", "password_file"):
        if getattr(security, key):
            raise _error(f"{section}.{key}", None, "is not used with OAUTHBEARER", "remove it")
    _check_exactly_one(security, section, "token_file", "token_endpoint", "the token")
    if security.token_file:
        _check_file_exists(f"{section}.token_file", security.token_file)
        return
    if not _is_web_address(security.token_endpoint):
        problem = "not an https URL without user name and password"
        remedy = "write https://host/path; plain http is allowed only for this machine itself"
        raise _error(f"{section}.token_endpoint", None, problem, remedy)  # no value: it may contain a password
    if not security.client_id:
        raise _error(f"{section}.client_id", None, "missing", "set it; token_endpoint needs it")
    security.client_secret(environment)


def _check_schema_registry(kafka: KafkaSettings, environment: Mapping[str, str]) -> None:
    registry, section = kafka.schema_registry, "kafka.schema_registry"
    if not kafka.uses_schemas:
        if registry.url or registry.directory:
            remedy = f'use "avro", or remove url and directory of {section}'
            raise _error("kafka.codec", kafka.codec, "does not use schemas", remedy)
        return
    _check_exactly_one(registry, section, "url", "directory", "schemas")
    _check_files(registry, section)
    if registry.directory and not Path(registry.directory).is_dir():
        raise _error(f"{section}.directory", registry.directory, "no such directory", "check the path")
    has_secrets = bool(registry.username or registry.password_env or registry.password_file)
    if registry.url:
        _check_web_address(f"{section}.url", registry.url, "a password", "https://host:port", has_secrets)
    if not registry.url.startswith("https:") and (registry.ca_file or registry.certificate_file):
        raise _error(f"{section}.url", registry.url, "does not use the TLS files", "use https, or remove the files")
    if has_secrets:
        if not registry.username:
            raise _error(f"{section}.username", None, "missing", "set it, or remove the password")
        _check_exactly_one(registry, section, "password_env", "password_file", "the password")
        registry.password(environment)


def _check_otel(otel: OtelSettings, environment: Mapping[str, str]) -> None:
    has_secrets = bool(otel.headers_env or otel.headers_file)
    if not otel.endpoint:
        if has_secrets or otel.ca_file:
            raise _error("otel.endpoint", None, "missing", "set it, or remove the headers and ca_file")
        return
    _check_web_address("otel.endpoint", otel.endpoint, "headers", "https://host:4318/v1/metrics", has_secrets)
    _check_files(otel, "otel")
    if otel.ca_file and not otel.endpoint.startswith("https:"):
        raise _error("otel.endpoint", otel.endpoint, "does not use ca_file", "use https, or remove the file")
    if has_secrets:
        _check_exactly_one(otel, "otel", "headers_env", "headers_file", "the headers")
        otel.headers(environment)


def _check_deep(deep: DeepSettings) -> None:
    _check_files(deep, "deep")
    if not deep.tls and (deep.ca_file or deep.certificate_file):
        raise _error("deep.tls", False, "does not use the TLS files", "set it to true, or remove the files")
    try:
        parse_addresses(deep.url)
    except ValueError as error:
        remedy = "write host:port, several separated by commas"
        raise _error("deep.url", deep.url, "not an address of Triton's gRPC", remedy) from error


def _check_web_address(key: str, url: str, secret: str, form: str, has_secrets: bool) -> None:
    if not _is_web_address(url, plain=not has_secrets):
        problem = f"not a URL, or contains a password, or would send {secret} unencrypted"
        remedy = f"write {form}; plain http is allowed only without {secret}, or for this machine itself"
        raise _error(key, None, problem, remedy)  # no value: it may contain a password


def _is_web_address(url: str, plain: bool = False) -> bool:
    """Whether `url` uses https without user name and password; http is allowed for this machine, and with `plain`."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    allowed = ("https", "http") if plain or host in ("localhost", "127.0.0.1", "::1") else ("https",)
    return bool(host) and parts.scheme in allowed and "@" not in parts.netloc and url.isprintable() and " " not in url


def _check_exactly_one(settings: msgspec.Struct, section: str, first: str, second: str, subject: str) -> None:
    if bool(getattr(settings, first)) == bool(getattr(settings, second)):
        problem = f"exactly one source of {subject} is needed"
        raise _error(f"{section}.{first}", None, problem, f"set either {first} or {second}")


def _check_files(settings: msgspec.Struct, section: str) -> None:
    for key in ("ca_file", "certificate_file", "key_file"):
        _check_file_exists(f"{section}.{key}", getattr(settings, key, ""))
    key_file = getattr(settings, "key_file", "")
    if key_file and not getattr(settings, "certificate_file", ""):
        raise _error(f"{section}.key_file", key_file, "has no certificate", "set certificate_file too")


def _check_file_exists(key: str, path: str) -> None:
    if path and not Path(path).is_file():
        raise _error(key, path, "no such file", "check the path")


def _read_secret(settings: msgspec.Struct, section: str, name: str, environment: Mapping[str, str]) -> str | None:
    """The secret that the keys `{name}_env` or `{name}_file` of a section point to; None if both are empty."""
    if variable := getattr(settings, f"{name}_env"):
        return _secret_from_environment(f"{section}.{name}_env", variable, environment)
    path = getattr(settings, f"{name}_file", "")
    return _secret_from_file(f"{section}.{name}_file", path) if path else None


def _secret_from_environment(key: str, variable: str, environment: Mapping[str, str]) -> str:
    # no value in the messages: it is likely the secret itself
    if not _VARIABLE_NAME.fullmatch(variable):
        problem = "not the name of an environment variable"
        raise _error(key, None, problem, "name the variable that contains the secret")
    secret = environment.get(variable)
    if not secret:
        raise _error(key, None, "that environment variable is not set", "set it, or name another")
    return secret


def _secret_from_file(key: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            octets = file.read(_SECRET_BYTES_MAX + 1)
        secret = octets.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(key, path, "cannot be read", "check the path and the file's permissions") from error
    if not secret or len(octets) > _SECRET_BYTES_MAX:
        raise _error(key, path, "is empty or too long", "make the secret the file's only line")
    return secret
