from __future__ import annotations

import re
from pathlib import Path

import pytest

from cascade.config import Config, SecuritySettings, check_instance, load_config
from cascade.errors import SettingError

EXAMPLE = Path(__file__).parents[2] / "docs" / "cascade.example.toml"


def load(tmp_path: Path, content: str | bytes, environment: dict[str, str] | None = None) -> Config:
    file = tmp_path / "cascade.toml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_config(file, environment or {})


def refusal(tmp_path: Path, content: str | bytes, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, content, environment)
    line = str(caught.value)
    assert "\n" not in line
    assert "cascade.toml" in line
    return line


def test_the_example_names_every_key_with_its_default() -> None:
    assert load_config(EXAMPLE, {}) == Config()
    text = EXAMPLE.read_text()

    def keys(section: object) -> set[str]:
        found = set()
        for name in section.__struct_fields__:  # type: ignore[attr-defined]
            value = getattr(section, name)
            found |= keys(value) if hasattr(value, "__struct_fields__") else {name}
        return found

    assert keys(Config()) == set(re.findall(r"^(\w+) = ", text, re.MULTILINE))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Config()


def test_a_worker_takes_its_name_from_the_environment_and_other_commands_need_none(tmp_path: Path) -> None:
    content = "[kafka]\ninstance_env = 'POD_NAME'"
    named = load(tmp_path, content, {"POD_NAME": "cascade-worker-3"}).kafka
    assert named.instance == "cascade-worker-3"
    check_instance(named)
    for environment in ({}, {"POD_NAME": ""}):
        nameless = load(tmp_path, content, environment).kafka
        assert nameless.instance == ""
        with pytest.raises(SettingError) as refused:
            check_instance(nameless)
        assert str(refused.value) == (
            "configuration: kafka.instance_env = 'POD_NAME': that environment variable is not set; set it to a name"
            " that only this worker has"
        )
    check_instance(load(tmp_path, "").kafka)


@pytest.mark.parametrize("name", ["a pod", "x" * 201, "pod/1"])
def test_a_name_that_no_group_member_can_have_is_refused(tmp_path: Path, name: str) -> None:
    line = refusal(tmp_path, "[kafka]\ninstance_env = 'POD_NAME'", {"POD_NAME": name})
    assert f"kafka.instance_env = 'POD_NAME': that environment variable is '{name}'; use up to 200 letters" in line


def test_the_environment_overrides_the_bootstrap_address(tmp_path: Path) -> None:
    config = load(tmp_path, '[kafka]\nbootstrap = "a:1"', {"KAFKA_BOOTSTRAP": "b:2, c:3"})
    assert config.kafka.servers == ["b:2", "c:3"]


OAUTH = "[kafka.security]\nprotocol = 'SASL_SSL'\nsasl_mechanism = 'OAUTHBEARER'\n"
ENDPOINT = OAUTH + "token_endpoint = 'https://idp.example/token'\n"
AVRO = "[kafka]\ncodec = 'avro'\n[kafka.schema_registry]\n"
OTEL = "[otel]\nendpoint = 'https://collector:4318/v1/metrics'\n"
HEADERS = {"H": "a=b", "BAD": "hunter2", "SPLIT": "a=hunter2%0d%0ax: y"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[kafka]\nbootstrp = 'a:1'", ["kafka.bootstrp", "unknown key", "did you mean bootstrap?"]),
        ("[kafka.securty]\n", ["kafka.securty", "unknown key", "did you mean security?"]),
        ("[wroker]\n", ["wroker", "did you mean worker?"]),
        ("[deep]\ntimeout = 3", ["deep.timeout: unknown key; known: backend, "]),
        ("[worker]\nbatch_rows_max = '12'", ["worker.batch_rows_max = '12'", "expected int, got str", "1 to 65536"]),
        ("[worker]\nbatch_rows_max = 0", ["worker.batch_rows_max = 0", ">= 1", "use 1 to 65536"]),
        ("[worker]\nbatch_rows_max = true", ["worker.batch_rows_max = True", "got bool"]),
        ("[sla]\nscreened_p99_ms = 0", ["sla.screened_p99_ms = 0", "more than 0"]),
        ("[sla]\nscreened_p99_ms = nan", ["sla.screened_p99_ms"]),
        ("[sla]\ndegraded_share_max = 1.5", ["sla.degraded_share_max = 1.5", "use 0 to 1"]),
        ("[health]\nport = 70000", ["health.port = 70000", "0 to 65535"]),
        (
            "delivery = 'exactly-once'\n[kafka]\nclient = 'kafka-python'",
            ["kafka.client = 'kafka-python'", "no exactly-once", 'set it to "librdkafka", or delivery'],
        ),
        ("[kafka]\nclient = 'other'", ["kafka.client = 'other'", 'use "kafka-python" or "librdkafka"']),
        (
            "[deep]\nbackend = 'tensorflow'",
            ["deep.backend = 'tensorflow': not one of the choices", 'use "onnxruntime" or "triton"'],
        ),
        ("[kafka]\nbootstrap = 'nowhere'", ["kafka.bootstrap = 'nowhere'", "host:port"]),
        ("[kafka]\nbootstrap = ' , '", ["kafka.bootstrap", "host:port"]),
        ("[deep]\nurl = 'http://triton:8001'", ["deep.url = 'http://triton:8001'", "host:port, several"]),
        ("[deep]\nurl = 'triton:8001,'", ["deep.url = 'triton:8001,'", "host:port, several"]),
        ("[kafka.topics]\nlabels = 'transactions'", ["kafka.topics.", "twice"]),
        ("[kafka.topics]\nlabels = 'a b'", ["kafka.topics.labels = 'a b'"]),
        ("kafka = 3", ["kafka = 3", "expected table, got int"]),
        ("[deadline]\nbudget_ms = 1.5", ["deadline.budget_ms = 1.5"]),
        ("[deadline\n", ["is not TOML", "line 1"]),
        (b"\xff\xfe", ["is not UTF-8"]),
        ("[kafka.security]\npassword = 'hunter2!'", ["kafka.security.password", "unknown key"]),
        ("[kafka]\ninstance = 'a'\ninstance_env = 'B'", ["instance_env", "set either instance or instance_env"]),
        ("[kafka]\ninstance_env = 'POD-NAME'", ["instance_env", "POD-NAME", "not the name of an environment variable"]),
        ("[kafka.security]\npassword_env = 'hunter2!'", ["password_env", "not the name of an environment variable"]),
        ("[deep]\nca_file = 'pyproject.toml'", ["deep.tls", "does not use the TLS files"]),
        ("[kafka.security]\nca_file = 'pyproject.toml'", ["kafka.security.protocol", "does not use the TLS files"]),
        ("[deep]\nca_file = '/nowhere/ca.pem'", ["deep.ca_file", "no such file"]),
        ("[kafka.security]\nprotocol = 'SASL_SSL'", ["kafka.security.username", "missing"]),
        (
            "[kafka.security]\nprotocol = 'SASL_SSL'\nusername = 'u'",
            ["password_env", "set either password_env or password_file"],
        ),
        (
            "[kafka.security]\nprotocol = 'SASL_SSL'\nusername = 'u'\npassword_env = 'UNSET_VARIABLE'",
            ["kafka.security.password_env", "not set"],
        ),
        (
            "[kafka.security]\nprotocol = 'SASL_SSL'\nusername = 'u'\npassword_file = '/nowhere/password'",
            ["kafka.security.password_file", "cannot be read"],
        ),
        (OAUTH, ["kafka.security.token_file", "exactly one source", "token_endpoint"]),
        (OAUTH + "token_file = 't'\ntoken_endpoint = 'https://a/b'", ["token_file", "exactly one source"]),
        (OAUTH + "token_file = '/nowhere/token'", ["token_file = '/nowhere/token'", "no such file"]),
        (OAUTH + "token_file = 't'\nusername = 'u'", ["username", "is not used with OAUTHBEARER"]),
        (OAUTH + "token_endpoint = 'http://idp.example/token'", ["token_endpoint", "not an https URL"]),
        (OAUTH + "token_endpoint = 'https://u:hunter2@idp.example/'", ["token_endpoint", "not an https URL"]),
        (OAUTH + "token_endpoint = 'https://idp.example:x/'", ["token_endpoint", "not an https URL"]),
        (ENDPOINT, ["client_id", "missing"]),
        (ENDPOINT + "client_id = 'c'", ["client_secret_env", "set either client_secret_env or client_secret_file"]),
        (ENDPOINT + "client_id = 'c'\nclient_secret_env = 'UNSET_VARIABLE'", ["client_secret_env", "not set"]),
        (ENDPOINT + "client_id = 'c'\nclient_secret_file = '/nowhere/s'", ["client_secret_file", "cannot be read"]),
        ("[kafka.security]\ntoken_file = 't'", ["sasl_mechanism", "does not use tokens"]),
        ("[kafka]\ncodec = 'avr'", ["kafka.codec = 'avr'", 'use "avro" or "binary" or "json" or "msgpack"']),
        (AVRO, ["kafka.schema_registry.url", "exactly one source of schemas", "set either url or directory"]),
        (AVRO + "url = 'http://a:1'\ndirectory = 'd'", ["kafka.schema_registry.url", "exactly one source"]),
        (AVRO + "directory = '/nowhere'", ["kafka.schema_registry.directory = '/nowhere'", "no such directory"]),
        (AVRO + "url = 'a:8081'", ["kafka.schema_registry.url", "write https://host:port"]),
        (AVRO + "url = 'http://u:hunter2@a:8081'", ["kafka.schema_registry.url", "contains a password"]),
        (AVRO + "url = 'http://a'\nusername = 'u'\npassword_env = 'S'", ["url", "would send a password unencrypted"]),
        (AVRO + "url = 'https://a'\nusername = 'u'", ["password_env", "set either password_env or password_file"]),
        (AVRO + "url = 'https://a'\npassword_env = 'S'", ["kafka.schema_registry.username", "missing"]),
        (AVRO + "url = 'https://a'\nusername = 'u'\npassword_env = 'S'", ["password_env", "not set"]),
        (AVRO + "url = 'https://a'\nca_file = '/nowhere'", ["kafka.schema_registry.ca_file", "no such file"]),
        (AVRO + "url = 'http://a'\nca_file = 'pyproject.toml'", ["url", "does not use the TLS files"]),
        (AVRO.replace("avro", "json") + "url = 'http://a:1'", ["kafka.codec = 'json'", "does not use schemas"]),
        ("[otel]\ninterval_s = 0.5", ["otel.interval_s = 0.5", "use 1 to 3600"]),
        ("[otel]\nca_file = 'ca.pem'", ["otel.endpoint", "missing"]),
        ("[otel]\nheaders_env = 'H'", ["otel.endpoint", "missing"]),
        ("[otel]\nendpoint = 'collector:4318'", ["otel.endpoint", "not a URL", "write https://host:4318/v1/metrics"]),
        ("[otel]\nendpoint = 'https://u:hunter2@collector/'", ["otel.endpoint", "contains a password"]),
        (OTEL.replace("https", "http") + "headers_env = 'H'", ["otel.endpoint", "headers unencrypted"]),
        (OTEL.replace("https", "http") + "ca_file = 'pyproject.toml'", ["otel.endpoint", "does not use ca_file"]),
        (OTEL + "ca_file = '/nowhere'", ["otel.ca_file = '/nowhere'", "no such file"]),
        (OTEL + "headers_env = 'H'\nheaders_file = 'f'", ["otel.headers_env", "one source"]),
        (OTEL + "headers_env = 'ABSENT'", ["otel.headers_env", "not set"]),
        (OTEL + "headers_env = 'BAD'", ["otel.headers_env", "these are no headers", "name=value"]),
        (OTEL + "headers_env = 'SPLIT'", ["otel.headers_env", "these are no headers"]),
        (OTEL + "headers_file = '/nowhere'", ["otel.headers_file", "cannot be read"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: str | bytes, parts: list[str]) -> None:
    line = refusal(tmp_path, content, HEADERS)
    assert "hunter2" not in line
    for part in parts:
        assert part in line


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.toml: file: cannot be read"):
        load_config(tmp_path / "nowhere.toml", {})


def test_schemas_come_from_a_registry_or_a_directory(tmp_path: Path) -> None:
    assert load(tmp_path, AVRO + "url = 'http://registry:8081'").kafka.schema_registry.password({}) is None
    assert load(tmp_path, AVRO + f"directory = '{tmp_path}'").kafka.schema_registry.url == ""
    content = AVRO + "url = 'https://registry'\nusername = 'u'\npassword_env = 'S'"
    assert load(tmp_path, content, {"S": "secret"}).kafka.schema_registry.password({"S": "secret"}) == "secret"


def test_a_collector_may_be_anywhere_without_headers_and_here_with_them(tmp_path: Path) -> None:
    assert load(tmp_path, OTEL.replace("https", "http")).otel.headers({}) == {}
    here = OTEL.replace("https://collector", "http://127.0.0.1") + "headers_env = 'H'"
    loaded = load(tmp_path, here, {"H": "a=b%2Cc, d = e"})
    assert loaded.otel.headers({"H": "a=b%2Cc, d = e"}) == {"a": "b,c", "d": "e"}
    assert "b,c" not in repr(loaded)


def test_tokens_need_no_user_name_and_http_is_for_this_machine_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("t")
    assert load(tmp_path, OAUTH + f"token_file = '{file}'").kafka.security.uses_tokens
    local = OAUTH + "token_endpoint = 'http://127.0.0.1:80/t'\nclient_id = 'c'\nclient_secret_env = 'S'"
    assert load(tmp_path, local, {"S": "secret"}).kafka.security.client_secret({"S": "secret"}) == "secret"


def test_secrets_come_from_the_environment_or_a_file_and_show_nowhere(tmp_path: Path) -> None:
    secret_file = tmp_path / "password"
    secret_file.write_text("from-file\n")
    base = "[kafka.security]\nprotocol = 'SASL_PLAINTEXT'\nusername = 'u'\n"
    by_name = load(tmp_path, base + "password_env = 'KAFKA_PASSWORD'", {"KAFKA_PASSWORD": "from-env"})
    by_file = load(tmp_path, base + f"password_file = '{secret_file}'")
    assert by_name.kafka.security.password({"KAFKA_PASSWORD": "from-env"}) == "from-env"
    assert by_file.kafka.security.password({}) == "from-file"
    assert "from-env" not in repr(by_name)
    assert "from-file" not in repr(by_file)


def test_the_key_of_the_card_hash_is_checked_when_the_file_is_loaded(tmp_path: Path) -> None:
    content = "[privacy]\nhash_card = true\nkey_env = 'CARD_KEY'"
    assert "of some length" not in repr(load(tmp_path, content, {"CARD_KEY": "a key of some length"}))
    assert "privacy.key_env: that environment variable is not set" in refusal(tmp_path, content)
    assert "privacy.key_env: that key has fewer than 16" in refusal(tmp_path, content, {"CARD_KEY": "hunter2!"})
    assert "hunter2" not in refusal(tmp_path, content, {"CARD_KEY": "hunter2!"})
    assert "exactly one source" in refusal(tmp_path, "[privacy]\nhash_card = true")
    assert not load(tmp_path, "[privacy]\nkey_env = 'UNSET'").privacy.hash_card


def test_an_overlong_secret_file_is_refused(tmp_path: Path) -> None:
    secret_file = tmp_path / "password"
    secret_file.write_text("x" * 5_000)
    with pytest.raises(SettingError, match="too long"):
        SecuritySettings(password_file=str(secret_file)).password({})
