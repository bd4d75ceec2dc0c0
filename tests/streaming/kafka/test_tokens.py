from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade.config import SecuritySettings
from cascade.errors import BrokerError, SettingError
from streaming.kafka.tokens import ClientCredentialsToken, FileToken, TokenRefusedError, make_token_provider
from tests.certificates import make_authority
from tests.token_server import TokenServer, token_server


@pytest.fixture
def server() -> Iterator[TokenServer]:
    with token_server() as running:
        yield running


@pytest.fixture
def provider(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> ClientCredentialsToken:
    monkeypatch.setenv("CLIENT_SECRET", server.secret)
    return ClientCredentialsToken(settings(server))


def settings(server: TokenServer, **more: str) -> SecuritySettings:
    return SecuritySettings(
        protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", token_endpoint=server.url, client_id="cascade",
        client_secret_env="CLIENT_SECRET", **more,
    )  # fmt: skip


def test_a_token_is_fetched_once_and_again_shortly_before_it_expires(
    server: TokenServer, provider: ClientCredentialsToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = provider.token()
    assert provider.token() == first
    assert server.asked == 1
    assert server.forms == [{"grant_type": ["client_credentials"]}]
    now_s = time.monotonic()
    monkeypatch.setattr("streaming.kafka.tokens.time.monotonic", lambda: now_s + server.life_s - 31)
    assert provider.token() == first
    monkeypatch.setattr("streaming.kafka.tokens.time.monotonic", lambda: now_s + server.life_s - 29)
    assert provider.token() != first
    assert server.asked == 2


def test_a_short_lived_token_is_used_for_half_of_its_life(
    server: TokenServer, provider: ClientCredentialsToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.life_s = 20.0
    now_s = time.monotonic()
    monkeypatch.setattr("streaming.kafka.tokens.time.monotonic", lambda: now_s)
    first = provider.token()
    monkeypatch.setattr("streaming.kafka.tokens.time.monotonic", lambda: now_s + 9)
    assert provider.token() == first
    monkeypatch.setattr("streaming.kafka.tokens.time.monotonic", lambda: now_s + 11)
    assert provider.token() != first


def test_the_scope_is_asked_for(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_SECRET", server.secret)
    ClientCredentialsToken(settings(server, scope="kafka.read kafka.write")).token()
    assert server.forms[0]["scope"] == ["kafka.read kafka.write"]


def test_neither_token_nor_secret_show_in_representations(
    server: TokenServer, provider: ClientCredentialsToken
) -> None:
    token = provider.token()
    assert token not in repr(vars(provider))
    assert server.secret not in repr(vars(provider))
    assert repr(token) == "'***'"


def test_a_wrong_secret_is_refused_in_one_line_without_it(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_SECRET", "wr0ng")
    with pytest.raises(TokenRefusedError, match=r"status 401 \(invalid_client\)") as caught:
        ClientCredentialsToken(settings(server)).token()
    assert "wr0ng" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("instead", "text"),
    [
        ((500, {}, b"down\nfor\nnow"), "status 500"),
        ((401, {}, b'{"error": "a\\nlong story with s3cret"}'), "status 401;"),
        ((200, {}, b"not JSON"), "no valid token"),
        ((200, {}, b'{"access_token": "a b\\u0001c"}'), "no valid token"),
        ((200, {}, b'{"access_token": "abc", "expires_in": 0}'), "no valid token"),
        ((200, {}, b'{"access_token": "' + b"a" * 70_000 + b'"}'), "no valid token"),
    ],
)
def test_an_answer_that_is_no_token_is_one_line(
    server: TokenServer, provider: ClientCredentialsToken, instead: tuple[int, dict[str, str], bytes], text: str
) -> None:
    server.instead = instead
    with pytest.raises(BrokerError, match=text) as caught:
        provider.token()
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_credentials_are_not_sent_on_where_the_endpoint_points_elsewhere(
    server: TokenServer, provider: ClientCredentialsToken
) -> None:
    with token_server() as other:
        server.instead = (302, {"Location": other.url}, b"")
        with pytest.raises(BrokerError, match="status 302"):
            provider.token()
        assert other.asked == 0


def test_a_slow_endpoint_is_not_waited_for(
    server: TokenServer, provider: ClientCredentialsToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.tokens.FETCH_TIMEOUT_S", 0.2)
    server.delay_s = 60.0
    started_s = time.monotonic()
    with pytest.raises(BrokerError, match="timed out"):
        provider.token()
    assert time.monotonic() - started_s < 30.0


def test_the_endpoint_must_be_vouched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, other = make_authority(tmp_path / "authority"), make_authority(tmp_path / "other")
    with token_server(authority.issue("endpoint", ["localhost"])) as server:
        monkeypatch.setenv("CLIENT_SECRET", server.secret)
        assert ClientCredentialsToken(settings(server, ca_file=str(authority.ca_file))).token()
        with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            ClientCredentialsToken(settings(server, ca_file=str(other.ca_file))).token()
        assert "\n" not in str(caught.value)


def test_a_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first.token\n")
    provider = make_token_provider(SecuritySettings(token_file=str(file)))
    assert isinstance(provider, FileToken)
    assert provider.token() == "first.token"
    file.write_text("second.token")
    assert provider.token() == "second.token"
    assert repr(provider.token()) == "'***'"


@pytest.mark.parametrize("content", [b"", b"two\nlines", b"with space", b"\xff", b"a\x01b", b"a" * 70_000])
def test_a_file_without_a_token_is_one_line_that_does_not_show_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(BrokerError, match="token_file") as caught:
        FileToken(file).token()
    assert "\n" not in str(caught.value)
    assert "space" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="no such file"):
        FileToken(tmp_path / "nowhere").token()


def test_a_missing_secret_is_a_setting_error(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIENT_SECRET", raising=False)
    with pytest.raises(SettingError, match="client_secret_env"):
        ClientCredentialsToken(settings(server))
