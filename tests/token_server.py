"""An OAuth token endpoint for tests: client credentials in, unsigned tokens out."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def unsigned_token(subject: str, life_s: float) -> str:
    """A JSON Web Token of algorithm `none` (RFC 7519, section 6)."""
    now_s = time.time()
    claims = {"sub": subject, "iat": now_s, "exp": now_s + life_s}
    return (
        ".".join(
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "none"}, claims)
        )
        + "."
    )


class TokenServer(ThreadingHTTPServer):
    """Gives tokens to `cascade` with the secret `s3cret/+ &`; counts what it was asked."""

    secret = "s3cret/+ &"

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.life_s = 3_600.0
        self.asked = 0
        self.forms: list[dict[str, list[str]]] = []
        # what is answered instead of a token: status, headers, body
        self.instead: tuple[int, dict[str, str], bytes] | None = None
        self.delay_s = 0.0
        self._tls = certificate is not None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        """Where clients ask."""
        host = "https://localhost" if self._tls else "http://127.0.0.1"
        return f"{host}:{self.server_address[1]}/token"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: TokenServer

    def do_GET(self) -> None:
        self.server.asked += 1
        self._answer(200, {}, b"{}")

    def do_POST(self) -> None:
        server = self.server
        server.asked += 1
        time.sleep(server.delay_s)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        server.forms.append(urllib.parse.parse_qs(body))
        if server.instead is not None:
            return self._answer(*server.instead)
        pair = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode().split(":")
        if [urllib.parse.unquote(part) for part in pair] != ["cascade", server.secret]:
            return self._answer(401, {}, b'{"error": "invalid_client"}')
        token = {"access_token": unsigned_token("cascade", server.life_s), "expires_in": server.life_s}
        return self._answer(200, {}, json.dumps(token).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def token_server(certificate: tuple[Path, Path] | None = None) -> Iterator[TokenServer]:
    """A server that runs; with `certificate` (and key) it speaks TLS."""
    server = TokenServer(certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
