"""The service's configuration file, `cascade.toml`: its sections, their defaults and limits, and the loader.

Paths are relative to the directory that the service runs in. Secrets never stand in the file: it names the
environment variable or the file that holds them, and they are read when a client is made.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tomllib
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from cascade.errors import SettingError
from cascade.schema import read_setting_file

CodecName = Literal["json", "msgpack", "binary", "avro"]
ClientName = Literal["kafka-python", "librdkafka"]
SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
OptionalText = Annotated[str, msgspec.Meta(max_length=1024)]
TopicName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
_SECRET_BYTES_MAX = 4096
# A shorter key could be found by trying all of them on a card that is known.
HASH_KEY_CHARACTERS_MIN = 16
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class BundleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[bundle]`: the directory of the bundle that decides."""

    path: Text = "bundle"


class TopicSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.topics]`: the names of the topics; `summaries` is used where `terminals.share` is set."""

    transactions: TopicName = "transactions"
    labels: TopicName = "labels"
    decisions: TopicName = "decisions"
    dead_letters: TopicName = "dead-letters"
    summaries: TopicName = "terminal-summaries"


class SecuritySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.security]`: TLS and SASL towards the brokers; empty text means absent.

    `certificate_file` and `key_file` (PEM) are the client's own, for mutual TLS. `key_password_env` and
    `password_env` name environment variables, `password_file` a file whose only line is the password. With
    `OAUTHBEARER` a token takes the place of user name and password: from `token_file`, whose only line it is, read at
    each connection; or from `token_endpoint`, an OAuth server that `ca_file` vouches for, which gives it to `client_id`
    and its secret (`client_secret_env` or `client_secret_file`) for `scope`.
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
        """Whether the client names itself, with user name and password or with a token."""
        return self.protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    @property
    def uses_tokens(self) -> bool:
        """Whether it does so with a token."""
        return self.uses_sasl and self.sasl_mechanism == "OAUTHBEARER"

    def password(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The SASL password, read now; raises SettingError where it is named but absent."""
        if self.password_env:
            return _secret_from_environment("kafka.security.password_env", self.password_env, environment)
        if self.password_file:
            return _secret_from_file("kafka.security.password_file", self.password_file)
        return None

    def client_secret(self, environment: Mapping[str, str] = os.environ) -> str:
        """The secret of `client_id`, read now; raises SettingError where it is absent."""
        if self.client_secret_env:
            return _secret_from_environment("kafka.security.client_secret_env", self.client_secret_env, environment)
        return _secret_from_file("kafka.security.client_secret_file", self.client_secret_file)

    def key_password(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The password of `key_file`, read now; raises SettingError where it is named but absent."""
        if not self.key_password_env:
            return None
        return _secret_from_environment("kafka.security.key_password_env", self.key_password_env, environment)


class SchemaRegistrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka.schema_registry]`: where the codec `avro` finds the schemas that messages name; empty text means absent.

    `url`: of a registry with Confluent's REST API; or `directory`, with a file `{number}.avsc` for each schema.
    `ca_file` vouches for the registry, `certificate_file` and `key_file` (PEM) are the client's own. `username` goes
    with `password_env`, an environment variable's name, or `password_file`, a file whose only line is the password.
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
        """The password of `username`, read now, None where there is neither; raises SettingError where it is absent."""
        if self.password_env:
            return _secret_from_environment("kafka.schema_registry.password_env", self.password_env, environment)
        if self.password_file:
            return _secret_from_file("kafka.schema_registry.password_file", self.password_file)
        return None


class KafkaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[kafka]`: brokers (`host:port`, several separated by commas), client library, group, codec and topics.

    `instance`: this worker's name, the same at each of its starts and no other's (a pod's name, say): a restart keeps
    its partitions, and shuts out what is left of the run before. Empty: another name at each start.
    `lost`: where the broker is gone or refuses what was decided, `retry` with everything made anew, for at most
    `lost_s_max` seconds without progress, or `exit` at once.
    """

    bootstrap: Text = "127.0.0.1:9092"
    client: ClientName = "kafka-python"
    group: Text = "cascade"
    instance: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{0,200}$")] = ""
    codec: CodecName = "json"
    lost: Literal["retry", "exit"] = "retry"
    lost_s_max: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 300.0
    topics: TopicSettings = TopicSettings()
    security: SecuritySettings = SecuritySettings()
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()

    @property
    def servers(self) -> list[str]:
        """The bootstrap addresses, one by one."""
        return [server.strip() for server in self.bootstrap.split(",") if server.strip()]


class DeepSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[deep]`: where the deep model runs; `url` (`host:port` of gRPC), `tls` and its files belong to Triton.

    `threads`: CPU threads of ONNX Runtime in process; `device`: where it computes (`cuda`: a GPU). `hedge_ms`: ask
    Triton a second time where no answer came after so long, and take the first answer; 0 never does.
    `start_wait_s_max`: the start waits so long for the model; then the screener decides what is escalated until it is
    there.
    """

    backend: Literal["triton", "onnxruntime"] = "triton"
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


class DeadlineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[deadline]`: the time that a transaction has, in ms, and from when it counts.

    `start`: `append`, the moment at which the broker's record was stamped; `fetch`, for back-fills of a backlog,
    where all append times are long past.
    """

    budget_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 50
    start: Literal["append", "fetch"] = "append"


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[breaker]`: when the deep model is left alone.

    It opens where, of the last `calls`, `failures_share` failed or came too late, for `pause_ms`; each failed trial
    doubles the pause, up to `pause_ms_max`.
    """

    calls: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 20
    failures_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    pause_ms: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 500
    pause_ms_max: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 10_000


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[worker]`: how many workers, and the bounds of the loop.

    `processes`: workers that `cascade run` starts side by side, in one consumer group; each has the bounds below, and
    the limits of the features' state, for itself. `batch_rows_max`: rows of one micro-batch. `in_flight_max`: rows
    escalated and unanswered, beyond which partitions pause. `in_flight_card_max`: of one card, beyond which the
    screener decides (`queue-full`), so that a flood of one card leaves room for the others. `commit_interval_ms`: with
    at-least-once delivery; `transaction_interval_ms`: with exactly-once, where decisions show only then.
    `drain_timeout_ms`: after SIGTERM; `revoke_timeout_ms`: where a rebalance takes partitions away.
    `message_bytes_max`: larger messages go to the dead letters, as do events that are more than `ahead_ms_max` ahead of
    their record's time. `lock_memory`: what a worker has touched stays in memory, its feature state above all; that
    has to be allowed.
    """

    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 1_024
    in_flight_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4_096
    in_flight_card_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 64
    commit_interval_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 500
    transaction_interval_ms: Annotated[int, msgspec.Meta(ge=5, le=10_000)] = 100
    # far below the five minutes after which a group takes a silent member for dead
    revoke_timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 5_000
    # below Kubernetes' grace period of 30 s, with time left to commit and leave the group
    drain_timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=600_000)] = 20_000
    poll_timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    message_bytes_max: Annotated[int, msgspec.Meta(ge=64, le=1_048_576)] = 65_536
    ahead_ms_max: Annotated[int, msgspec.Meta(ge=0, le=31_536_000_000)] = 3_600_000
    lock_memory: bool = False


class LabelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[labels]`: how the labels topic is followed.

    `alignment`: `arrival`, labels act when they come; `exact`, before a batch is scored the labels topic is read up
    to its end as it was after the fetch, which costs a broker round trip a batch and makes runs reproducible.
    """

    alignment: Literal["arrival", "exact"] = "arrival"


class StateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[state]`: where snapshots of the feature state are kept: a directory or, through fsspec, an object store's URL.

    Empty: none, and every start folds the log from its beginning. `interval_s`: between two snapshots. `keep`: how
    many; more than one, since the newest may be damaged or ahead of the committed offsets.
    """

    snapshots: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=86_400)] = 60.0
    keep: Annotated[int, msgspec.Meta(ge=2, le=100)] = 3


class DuplicateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[duplicates]`: a transaction that comes again gets its first decision again, marked `duplicate`.

    Again: the same id, card and amount, in the same partition, at most `window_s` seconds (by the log's clock) after
    the first; 0 looks for none. `ids_max`: how many are remembered, beyond it the oldest is forgotten.
    """

    window_s: Annotated[float, msgspec.Meta(ge=0, le=604_800)] = 600.0
    ids_max: Annotated[int, msgspec.Meta(ge=1_024, le=67_108_864)] = 262_144


class OverloadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[overload]`: where the deep stage saturates, fewer transactions are escalated.

    After `after_s` seconds with more than `in_flight_share` of `worker.in_flight_max` waiting, or with more than
    `late_share` of the escalated too late or refused (`deadline`, `queue-full`), the escalation threshold rises by
    `step` (log-odds of the screener), and by another after each further `after_s`, up to `raise_max`; after `calm_s`
    seconds without, it comes down by a step at a time. `raise_max` 0 leaves it alone.
    """

    raise_max: Annotated[float, msgspec.Meta(ge=0, le=50)] = 4.0
    step: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.5
    in_flight_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    late_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    after_s: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 2.0
    calm_s: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 10.0


class TerminalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[terminals]`: with several workers, each sees only its partitions' transactions of a terminal.

    `share`: publish summaries of them to `kafka.topics.summaries`, and count those of the other workers. Every
    `interval_s` seconds: what others did is known that much later. `bucket_s`: a summary's stretch of event time; what
    others did leaves a window by whole buckets.
    """

    share: bool = False
    interval_s: Annotated[float, msgspec.Meta(ge=0.05, le=3_600)] = 5.0
    bucket_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 3_600


class PrivacySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[privacy]`: with `hash_card`, card ids become keyed hashes before they reach state, logs or topics.

    `key_env` names the environment variable that holds the key, `key_file` a file whose only line is the key: at least
    16 characters, the same for every worker and every start.
    """

    hash_card: bool = False
    key_env: OptionalText = ""
    key_file: OptionalText = ""

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The key, read now, None where none is needed; raises SettingError where it is missing or too short."""
        if not self.hash_card:
            return None
        if bool(self.key_env) == bool(self.key_file):
            raise SettingError(
                "configuration",
                "privacy.key_env",
                None,
                "exactly one source of the key is needed for hash_card",
                "set either key_env or key_file",
            )
        if self.key_env:
            name, key = "key_env", _secret_from_environment("privacy.key_env", self.key_env, environment)
        else:
            name, key = "key_file", _secret_from_file("privacy.key_file", self.key_file)
        if len(key) < HASH_KEY_CHARACTERS_MIN:
            raise SettingError(
                "configuration",
                f"privacy.{name}",
                None,
                f"that key has fewer than {HASH_KEY_CHARACTERS_MIN} characters",
                "make one with `openssl rand -hex 32`",
            )
        return key


class SlaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[sla]`: p99 latency limits in ms, and the largest share of decisions that may be degraded."""

    screened_p99_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 5.0
    escalated_p99_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 20.0
    degraded_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.001


class EnergySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[energy]`: the figures behind modelled joules: CPU seconds × `watts_per_core`, where no counter exists.

    `processor`: a row of the table of processors (docs/energy.md), whose watts a hardware thread are then used instead.
    `idle_watts_per_core`, `gpu_idle_watts`: drawn by each reserved core, and each GPU, without work; 0 for not stated.
    """

    # 225 W of thermal design power over the 32 hardware threads of a mid-range server CPU, rounded: a stated figure,
    # to be replaced by the operator's own; ratios between runs do not depend on it
    watts_per_core: Annotated[float, msgspec.Meta(gt=0, le=1_000)] = 7.0
    processor: OptionalText = ""
    idle_watts_per_core: Annotated[float, msgspec.Meta(ge=0, le=1_000)] = 0.0
    gpu_idle_watts: Annotated[float, msgspec.Meta(ge=0, le=2_000)] = 0.0


class CarbonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[carbon]`: what turns joules into gCO2e; without a region or a file there is no carbon in the ledger.

    `file`: intensities by the hour instead of the region's yearly average; `kind` says what they are. `embodied_kg`: of
    the hardware's making, of which `reserved_share` is this service's, over `life_years`.
    """

    region: OptionalText = ""
    file: OptionalText = ""
    kind: Literal["average", "marginal"] = "average"
    pue: Annotated[float, msgspec.Meta(ge=1, le=5)] = 1.54
    embodied_kg: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    reserved_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    life_years: Annotated[float, msgspec.Meta(gt=0, le=50)] = 4.0


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[ledger]`: where the ledger is kept on disk; an empty `directory` keeps none.

    A line every `interval_s`; a file is followed by another beyond `file_mb_max`, and the newest `files_max` stay.
    """

    directory: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60.0
    file_mb_max: Annotated[float, msgspec.Meta(gt=0, le=4_096)] = 32.0
    files_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64


class OtelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[otel]`: the ledger's metrics to an OpenTelemetry collector; without an endpoint none are sent.

    `endpoint`: the whole URL of OTLP over HTTP, `http://127.0.0.1:4318/v1/metrics`, which `ca_file` (PEM) vouches for.
    `headers_env` names an environment variable, `headers_file` a file whose only line is the headers, in the form of
    OTEL_EXPORTER_OTLP_HEADERS: `name=value`, several separated by commas, values percent-encoded.
    """

    endpoint: OptionalText = ""
    interval_s: Annotated[float, msgspec.Meta(ge=1, le=3_600)] = 60.0
    headers_env: OptionalText = ""
    headers_file: OptionalText = ""
    ca_file: OptionalText = ""

    def headers(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The headers by name, read now; raises SettingError where they are named but absent, or cannot be read."""
        if self.headers_env:
            name, text = "headers_env", _secret_from_environment("otel.headers_env", self.headers_env, environment)
        elif self.headers_file:
            name, text = "headers_file", _secret_from_file("otel.headers_file", self.headers_file)
        else:
            return {}
        found = {}
        for pair in text.split(","):
            key, _, value = (part.strip() for part in pair.partition("="))
            value = urllib.parse.unquote(value)
            if not (_HEADER_NAME.fullmatch(key) and value and value.isascii() and value.isprintable()):
                # not shown: they are secrets
                raise SettingError(
                    "configuration", f"otel.{name}", None, "these are no headers",
                    "write name=value, several separated by commas, what is special in a value percent-encoded",
                )  # fmt: skip
            found[key] = value
        return found


class HealthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[health]`: the address of `/` (the live page), `/healthz`, `/readyz` and `/metrics`; port 0 takes a free one.

    `stall_s_max`: a loop that has not gone round for this long, or a partition with lag of which no record was taken
    for this long, fails `/healthz`. A rebalance (5 s) and a commit (15 s) must fit.
    """

    enabled: bool = True
    stall_s_max: Annotated[float, msgspec.Meta(ge=20, le=3_600)] = 60.0
    host: Text = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 9464


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: the least level that is written, and whether as JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `cascade.toml`; every section and key may be left out.

    `delivery`: with `exactly-once`, decisions, dead letters and offsets are one Kafka transaction; with
    `at-least-once`, what was not yet committed is decided again after a crash, under the same `decision_id`.

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
    """Read and check a configuration file; `KAFKA_BOOTSTRAP` in the environment overrides `kafka.bootstrap`.

    Raises SettingError, one line with file, key, value and remedy, for a file that cannot be read, TOML that cannot
    be parsed, an unknown key, a wrong type, a value out of range, or settings that contradict each other.
    """
    origin = str(path)
    content = _parse_toml(read_setting_file(path), origin)
    try:
        config = msgspec.convert(content, Config)
    except msgspec.ValidationError as error:
        raise _explain(origin, content, str(error)) from error
    bootstrap = environment.get("KAFKA_BOOTSTRAP")
    if bootstrap:
        config = msgspec.structs.replace(config, kafka=msgspec.structs.replace(config.kafka, bootstrap=bootstrap))
    _check_kafka(config.kafka, origin, environment)
    _check_deep(config.deep, origin)
    _check_privacy(config.privacy, origin, environment)
    _check_otel(config.otel, origin, environment)
    return config


@contextlib.contextmanager
def with_config_path(path: object) -> Iterator[None]:
    """Adds the configuration file's name to a SettingError raised by code that knows only the settings."""
    try:
        yield
    except SettingError as error:
        if error.file != "configuration":
            raise
        raise SettingError(path, error.key, error.value, error.problem, error.remedy) from error


def _parse_toml(octets: bytes, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(octets.decode())
    except UnicodeDecodeError as error:
        raise SettingError(origin, "file", None, "is not UTF-8", "save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingError(
            origin, "file", None, f"is not TOML ({error})", "mend that line; docs/cascade.example.toml shows the form"
        ) from error


_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_PROBLEM = re.compile(r"(.+?) - at `\$\.(.*)`", re.DOTALL)


def _explain(origin: str, content: dict[str, Any], text: str) -> SettingError:
    unknown = _UNKNOWN.fullmatch(text)
    if unknown is not None:
        section = unknown[2] or ""
        known = _known_keys(section)
        near = difflib.get_close_matches(unknown[1], known, n=1)
        key = f"{section}.{unknown[1]}" if section else unknown[1]
        # the value is not shown: it may be a secret that was put here by mistake
        hint = f"did you mean {near[0]}? " if near else ""
        return SettingError(origin, key, None, "unknown key", f"{hint}known: {', '.join(known)}")
    problem = _PROBLEM.fullmatch(text)
    if problem is None:
        return SettingError(origin, "file", None, text, "see docs/cascade.example.toml")
    key = problem[2]
    return SettingError(origin, key, _value_at(content, key), _worded(problem[1]), _remedy(key))


def _worded(problem: str) -> str:
    if problem.startswith("Invalid enum value"):
        return "not one of the choices"
    return problem[0].lower() + problem[1:].replace("`", "")


def _remedy(key: str) -> str:
    kind = _type_at(key)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices:
        return "use " + " or ".join(f'"{choice}"' for choice in choices)
    for meta in getattr(kind, "__metadata__", ()):
        low, high = meta.ge if meta.ge is not None else meta.gt, meta.le
        if low is not None and high is not None:
            return f"use {'more than ' if meta.gt is not None else ''}{low} to {high}"
    return "see docs/cascade.example.toml"


def _type_at(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind, include_extras=True)[part]
    return kind


def _known_keys(section: str) -> list[str]:
    kind = _type_at(section) if section else Config
    return [field.name for field in msgspec.structs.fields(kind)]


def _value_at(content: dict[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value[part]
    return value


def _check_kafka(kafka: KafkaSettings, origin: str, environment: Mapping[str, str]) -> None:
    for server in kafka.servers or [""]:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) <= 65_535:
            raise SettingError(
                origin,
                "kafka.bootstrap",
                kafka.bootstrap,
                "not host:port, or several separated by commas",
                'write "127.0.0.1:9092", say (KAFKA_BOOTSTRAP in the environment overrides the file)',
            )
    names = {name: getattr(kafka.topics, name) for name in kafka.topics.__struct_fields__}
    for name, topic in names.items():
        if list(names.values()).count(topic) > 1:
            raise SettingError(origin, f"kafka.topics.{name}", topic, "names a topic twice", "give each its own")
    _check_security(kafka.security, origin, environment)
    _check_schema_registry(kafka, origin, environment)


def _check_security(security: SecuritySettings, origin: str, environment: Mapping[str, str]) -> None:
    section = "kafka.security"
    _check_files(security, section, origin)
    if not security.uses_tls and (security.ca_file or security.certificate_file):
        raise SettingError(
            origin,
            f"{section}.protocol",
            security.protocol,
            "leaves the TLS files unused",
            "use SSL or SASL_SSL, or remove the files",
        )
    if not security.uses_tokens and (security.token_file or security.token_endpoint):
        raise SettingError(
            origin,
            f"{section}.sasl_mechanism",
            security.sasl_mechanism,
            "leaves the source of tokens unused",
            'use SASL_SSL with "OAUTHBEARER", or remove token_file and token_endpoint',
        )
    if security.uses_tokens:
        _check_tokens(security, origin)
    elif security.uses_sasl:
        if not security.username:
            raise SettingError(origin, f"{section}.username", None, "missing", f"{security.protocol} needs it")
        _check_one_source(security, section, "password_env", "password_file", "the password", origin)
    with with_config_path(origin):
        if security.uses_tokens and security.token_endpoint:
            security.client_secret(environment)
        security.password(environment)
        security.key_password(environment)


def _check_schema_registry(kafka: KafkaSettings, origin: str, environment: Mapping[str, str]) -> None:
    registry, section = kafka.schema_registry, "kafka.schema_registry"
    if kafka.codec != "avro":
        if registry.url or registry.directory:
            raise SettingError(
                origin, "kafka.codec", kafka.codec, "leaves the source of schemas unused",
                'use "avro", or remove url and directory of kafka.schema_registry',
            )  # fmt: skip
        return
    _check_one_source(registry, section, "url", "directory", "schemas", origin)
    _check_files(registry, section, origin)
    if registry.directory and not Path(registry.directory).is_dir():
        raise SettingError(origin, f"{section}.directory", registry.directory, "no such directory", "check the path")
    secrets = bool(registry.username or registry.password_env or registry.password_file)
    if registry.url and not _is_web_address(registry.url, plain=not secrets):
        # not shown: there may be a password in it
        raise SettingError(
            origin, f"{section}.url", None, "not a URL, or holds a password, or would send one in the clear",
            "write https://host:port; http only without a password, or for this machine itself",
        )  # fmt: skip
    if not registry.url.startswith("https:") and (registry.ca_file or registry.certificate_file):
        raise SettingError(
            origin, f"{section}.url", registry.url, "leaves the TLS files unused", "use https, or remove the files"
        )
    if secrets:
        if not registry.username:
            raise SettingError(origin, f"{section}.username", None, "missing", "a password belongs to it")
        _check_one_source(registry, section, "password_env", "password_file", "the password", origin)
        with with_config_path(origin):
            registry.password(environment)


def _check_otel(otel: OtelSettings, origin: str, environment: Mapping[str, str]) -> None:
    secrets = bool(otel.headers_env or otel.headers_file)
    if not otel.endpoint:
        if secrets or otel.ca_file:
            raise SettingError(origin, "otel.endpoint", None, "missing", "headers and ca_file belong to it")
        return
    if not _is_web_address(otel.endpoint, plain=not secrets):
        # not shown: there may be a password in it
        raise SettingError(
            origin, "otel.endpoint", None, "not a URL, or holds a password, or would send headers in the clear",
            "write https://host:4318/v1/metrics; http only without headers, or for this machine itself",
        )  # fmt: skip
    if otel.ca_file and not Path(otel.ca_file).is_file():
        raise SettingError(origin, "otel.ca_file", otel.ca_file, "no such file", "check the path")
    if otel.ca_file and not otel.endpoint.startswith("https:"):
        raise SettingError(
            origin, "otel.endpoint", otel.endpoint, "leaves ca_file unused", "use https, or remove the file"
        )
    if otel.headers_env and otel.headers_file:
        raise SettingError(
            origin, "otel.headers_env", None, "one source of the headers is enough", "set headers_env or headers_file"
        )
    with with_config_path(origin):
        otel.headers(environment)


def _check_privacy(privacy: PrivacySettings, origin: str, environment: Mapping[str, str]) -> None:
    with with_config_path(origin):
        privacy.key(environment)


def _check_tokens(security: SecuritySettings, origin: str) -> None:
    section = "kafka.security"
    for key in ("username", "password_env", "password_file"):
        if getattr(security, key):
            raise SettingError(origin, f"{section}.{key}", None, "is not used with OAUTHBEARER", "remove it")
    _check_one_source(security, section, "token_file", "token_endpoint", "the token", origin)
    if security.token_file:
        if not Path(security.token_file).is_file():
            raise SettingError(origin, f"{section}.token_file", security.token_file, "no such file", "check the path")
        return
    if not _is_web_address(security.token_endpoint):
        # not shown: there may be a password in it
        raise SettingError(
            origin,
            f"{section}.token_endpoint",
            None,
            "not an https URL without user name and password",
            "write https://host/path; http only for this machine itself",
        )
    if not security.client_id:
        raise SettingError(origin, f"{section}.client_id", None, "missing", "token_endpoint needs it")
    _check_one_source(security, section, "client_secret_env", "client_secret_file", "the client's secret", origin)


def _is_web_address(url: str, plain: bool = False) -> bool:
    """Whether it is a URL of https; of http for this machine, or for any where `plain`."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    allowed = ("https", "http") if plain or host in ("localhost", "127.0.0.1", "::1") else ("https",)
    return bool(host) and parts.scheme in allowed and "@" not in parts.netloc and url.isprintable() and " " not in url


def _check_one_source(
    settings: SecuritySettings | SchemaRegistrySettings, section: str, one: str, other: str, what: str, origin: str
) -> None:
    if bool(getattr(settings, one)) == bool(getattr(settings, other)):
        raise SettingError(
            origin,
            f"{section}.{one}",
            None,
            f"exactly one source of {what} is needed",
            f"set either {one} or {other}",
        )


def _check_deep(deep: DeepSettings, origin: str) -> None:
    _check_files(deep, "deep", origin)
    if not deep.tls and (deep.ca_file or deep.certificate_file):
        raise SettingError(origin, "deep.tls", False, "leaves the TLS files unused", "set it to true, or remove them")


def _check_files(section: SecuritySettings | DeepSettings | SchemaRegistrySettings, name: str, origin: str) -> None:
    for key in ("ca_file", "certificate_file", "key_file"):
        file = getattr(section, key)
        if file and not Path(file).is_file():
            raise SettingError(origin, f"{name}.{key}", file, "no such file", "check the path")
    if section.key_file and not section.certificate_file:
        raise SettingError(
            origin, f"{name}.key_file", section.key_file, "belongs to a certificate", "set certificate_file too"
        )


def _secret_from_environment(key: str, variable: str, environment: Mapping[str, str]) -> str:
    if not _VARIABLE_NAME.fullmatch(variable):
        # not shown: it is likely the secret itself
        raise SettingError(
            "configuration",
            key,
            None,
            "not the name of an environment variable",
            "name the variable that holds the secret",
        )
    secret = environment.get(variable)
    if not secret:
        raise SettingError(
            "configuration", key, None, "that environment variable is not set", "set it, or name another"
        )
    return secret


def _secret_from_file(key: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            octets = file.read(_SECRET_BYTES_MAX + 1)
        secret = octets.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("configuration", key, path, "cannot be read", "check the path and its rights") from error
    if not secret or len(octets) > _SECRET_BYTES_MAX:
        raise SettingError("configuration", key, path, "is empty or too long", "put the secret on its only line")
    return secret
