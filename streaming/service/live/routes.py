"""The HTTP routes of the live page and its frames."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from streaming.health_state import HealthState
from streaming.service.health import Answer, Request, Route
from streaming.service.live.feed import LiveFeed
from streaming.service.live.page import live_page, page_policy


def live_routes(registry: CollectorRegistry, state: HealthState) -> dict[str, Route]:
    """Returns the routes by path."""
    feed = LiveFeed(registry, state)
    return {"/": _page, "/frames": lambda request: _frames(feed, request)}


def _page(request: Request) -> Answer:
    headers = {"Content-Security-Policy": page_policy(), "Vary": "Accept-Language"}
    body = live_page(request.query, request.accept_language)
    return Answer(HTTPStatus.OK, "text/html; charset=utf-8", body, headers)


def _frames(feed: LiveFeed, request: Request) -> Answer:
    (text,) = parse_qs(request.query).get("after", ["0"])[:1]
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        return Answer(HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", b"after: must be the number of a frame")
    return Answer(HTTPStatus.OK, "application/json", feed.since(int(text)))
