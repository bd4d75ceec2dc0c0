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

LANGUAGES: Final = ("en", "ja")


def live_page(query: str, accept_language: str) -> bytes:
    """Returns the page in the language of `lang=` in the query, else of the browser, else in English."""
    asked = [*parse_qs(query).get("lang", []), *_asked(accept_language)]
    return _page(next((language for language in asked if language in LANGUAGES), LANGUAGES[0]))


def page_policy() -> str:
    """Returns the Content-Security-Policy: only the page's script and style, and figures from this server."""
    return (
        f"default-src 'none'; script-src 'sha256-{_digest(_text('page.js'))}'; "
        f"style-src 'sha256-{_digest(_text('page.css'))}'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _asked(accept_language: str) -> list[str]:
    """The languages that a browser accepts, by descending quality."""
    wanted: list[tuple[float, int, str]] = []
    for index, part in enumerate(accept_language.split(",")[:16]):
        language, _, quality = part.strip().partition(";q=")
        try:
            wanted.append((-float(quality or "1"), index, language.partition("-")[0].strip().lower()))
        except ValueError:
            continue
    return [language for _, _, language in sorted(wanted)]


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
    return files("streaming.live").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
