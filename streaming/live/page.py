"""The page itself, put together from its files, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from typing import Final
from urllib.parse import parse_qs

import msgspec

LANGUAGES: Final = ("en", "ja")


def live_page(query: str, accept_language: str) -> bytes:
    """The page in the language of `lang=` in the query, else in the first that the browser asks for, else English."""
    asked = [*parse_qs(query).get("lang", []), *_asked(accept_language)]
    return _page(next((language for language in asked if language in LANGUAGES), LANGUAGES[0]))


def page_policy() -> str:
    """The Content-Security-Policy: the page's own script and style, and this server for figures."""
    return (
        f"default-src 'none'; script-src 'sha256-{_digest(_text('page.js'))}'; "
        f"style-src 'sha256-{_digest(_text('page.css'))}'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _asked(accept_language: str) -> list[str]:
    """Languages that a browser asks for, the most wanted first."""
    wanted: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept_language.split(",")[:16]):
        language, _, quality = part.strip().partition(";q=")
        try:
            wanted.append((-float(quality or "1"), place, language.partition("-")[0].strip().lower()))
        except ValueError:
            continue
    return [language for _, _, language in sorted(wanted)]


@cache
def _page(language: str) -> bytes:
    words = msgspec.json.decode(_text(f"texts/{language}.json"), type=dict[str, str])
    page = _text("page.html").replace("{{style}}", _text("page.css")).replace("{{script}}", _text("page.js"))
    # an attribute: a script element of data would need a hash of its own
    page = page.replace("{{words}}", escape(msgspec.json.encode(words).decode())).replace("{{language}}", language)
    for name, text in words.items():
        page = page.replace(f"[[{name}]]", escape(text))
    return page.encode()


@cache
def _text(name: str) -> str:
    return files("streaming.live").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
