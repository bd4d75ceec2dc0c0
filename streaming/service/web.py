"""Requests to web servers: with TLS from the settings' files, without redirects."""

from __future__ import annotations

import ipaddress
import ssl
import urllib.parse
import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Never follows a redirect: the credentials are for the configured server only."""
        del arguments


def make_opener(
    url: str, ca_file: str = "", certificate_file: str = "", key_file: str = ""
) -> urllib.request.OpenerDirector:
    """Makes an opener for `url`; `ca_file`: of the server's authority, `certificate_file`, `key_file`: the client's."""
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=ca_file or None)
        if certificate_file:
            context.load_cert_chain(certificate_file, key_file or None)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def is_loopback(url: str) -> bool:
    """Whether the server is on this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
