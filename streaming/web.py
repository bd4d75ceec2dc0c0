"""Asking web servers: TLS from the settings' files, and never on to another server."""

from __future__ import annotations

import ipaddress
import ssl
import urllib.parse
import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """The credentials are for the server that was named, and for no other."""
        del arguments


def make_opener(
    url: str, ca_file: str = "", certificate_file: str = "", key_file: str = ""
) -> urllib.request.OpenerDirector:
    """What opens requests to the server of `url`; `ca_file` vouches for it, the certificate is our own."""
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
    """Whether the server is this machine itself."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
