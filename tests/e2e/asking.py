"""Questions to a running service over its HTTP port, and messages to its topics."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cascade.config import Config
from streaming.kafka import ProducerClient, make_producer


def ask(config: Config, path: str, accept: str = "*/*") -> tuple[int, str]:
    """Status and body of the answer; 0 and nothing where there is none."""
    url = f"http://{config.health.host}:{config.health.port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def health(config: Config, path: str) -> tuple[int, dict[str, Any]]:
    """Status and content of `/healthz` or `/readyz`; 0 and nothing where there is no answer."""
    status, body = ask(config, path)
    return status, json.loads(body or "{}")


@contextmanager
def producing(config: Config) -> Iterator[ProducerClient]:
    """A producer whose records are acknowledged when the context ends without an error."""
    producer = make_producer(config.kafka)
    try:
        yield producer
        producer.flush(60)
    finally:
        producer.close(5)
