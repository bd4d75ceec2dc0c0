"""The page, assembled from its files, and its Content-Security-Policy."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from typing import Final
from urllib.parse import parse_qs

import msgspec

from streaming.service.health import qualities

LANGUAGES: Final = ("en", "ja")


def live_page(query: str, accept_language: str) -> bytes:
    """Returns the page in the language of `lang=` in the query, else of the browser, else in English."""
    accepted = qualities(accept_language)
    of_browser = [name.partition("-")[0] for name in sorted(accepted, key=lambda name: -accepted[name])]
    asked = [*parse_qs(query).get("lang", []), *of_browser]
    return _page(next((language for language in asked if language in LANGUAGES), LANGUAGES[0]))


def page_policy() -> str:
    """Returns the Content-Security-Policy: only the page's script and style, and figures from this server."""
    return (
        f"default-src 'none'; script-src 'sha256-{_digest(_text('page.js'))}'; "
        f"style-src 'sha256-{_digest(_text('page.css'))}'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _page(language: str) -> bytes:
    words = msgspec.json.decode(_text(f"texts/{language}.json"), type=dict[str, str])
    page = _text("page.html").replace("{{style}}", _text("page.css")).replace("{{script}}", _text("page.js"))
    # in an attribute: a script element would need another hash in the policy
    page = page.replace("{{words}}", escape(msgspec.json.encode(words).decode())).replace("{{language}}", language)
    for name, text in words.items():
        page = page.replace(f"[[{name}]]", escape(text))
    return page.encode()


@cache
def _text(name: str) -> str:
    return files("streaming.service.live").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
