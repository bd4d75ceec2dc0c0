"""Raw samples of series from Prometheus's HTTP API, with limits on whatever may answer there.

One query with a range selector, `{__name__=~"a|b"}[60s]`, returns the samples as they were scraped, with their times
(Prometheus documentation, HTTP API, instant queries, result type `matrix`). Nothing is interpolated or extrapolated, as
`increase()` would do.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from cascade.errors import CascadeError

ANSWER_S_MAX: Final = 10.0
ANSWER_BYTES_MAX: Final = 32 << 20
SERIES_MAX: Final = 20_000
# The names in a trace of windows have room for so many.
LABEL_LETTERS_MAX: Final = 100
_CHUNK_BYTES: Final = 1 << 16


class PrometheusError(CascadeError):
    """Prometheus did not answer a query, or answered with something else than samples."""


class Sample(NamedTuple):
    """A value at a time, in seconds since the epoch. The value may be NaN or infinite."""

    at_s: float
    value: float


class Series(NamedTuple):
    """The samples of one series, in the order of time."""

    name: str
    labels: Mapping[str, str]
    samples: tuple[Sample, ...]


class _Stream(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct, rename="camel"):
    result_type: Literal["matrix"]
    result: list[_Stream]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


def read_series(base: str, names: Iterable[str], range_s: float, at_s: float) -> list[Series]:
    """The samples of all series with these names in `range_s` seconds before `at_s`. Raises PrometheusError.

    Labels are cut at LABEL_LETTERS_MAX letters, and letters that a terminal would obey become "�".

    base: address of Prometheus, `http://127.0.0.1:9090`; a path in front of `/api/v1` is part of it.
    at_s: in seconds since the epoch, by Prometheus's clock.
    """
    if not base.startswith(("http://", "https://")):
        raise PrometheusError(f"{base}: not an address; use the form http://127.0.0.1:9090")
    query = urllib.parse.urlencode(
        {"query": f'{{__name__=~"{"|".join(names)}"}}[{round(range_s)}s]', "time": f"{at_s:.3f}"}
    )
    try:
        content = _get(f"{base.rstrip('/')}/api/v1/query?{query}")
    except urllib.error.HTTPError as error:
        with error:
            refusal = error.read(_CHUNK_BYTES)
        raise PrometheusError(f"{base}: the answer has the status {error.code}{_reason(refusal)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PrometheusError(f"{base}: no answer ({error!s:.200}); check the address and the port-forward") from error
    found = _decoded(content, base)
    if any(not at_s - range_s - 1.0 <= sample.at_s <= at_s + 1.0 for series in found for sample in series.samples):
        raise PrometheusError(f"{base}: the answer has samples from outside the {range_s:.0f} s that were asked for")
    return found


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


def _get(url: str) -> bytes:
    """The whole answer. Raises TimeoutError and ValueError beyond the limits of time and size."""
    deadline_s = time.monotonic() + ANSWER_S_MAX
    with urllib.request.urlopen(url, timeout=ANSWER_S_MAX) as answer:  # noqa: S310 - the caller has checked the scheme
        return _read(answer, deadline_s)


def _read(answer: _Readable, deadline_s: float) -> bytes:
    """In pieces: the socket's time limit is one of each piece, and would allow a byte every few seconds for ever."""
    content = bytearray()
    while piece := answer.read1(_CHUNK_BYTES):
        content += piece
        if len(content) > ANSWER_BYTES_MAX:
            raise ValueError(f"it is longer than {ANSWER_BYTES_MAX >> 20} MiB")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"it takes more than {ANSWER_S_MAX:g} s")
    return bytes(content)


def _reason(content: bytes) -> str:
    """Prometheus's own words about a query that it refuses."""
    try:
        error = msgspec.json.decode(content, type=_Answer).error
    except msgspec.MsgspecError:
        return ""
    return f" ({' '.join(error[:200].split())})" if error else ""


def _decoded(content: bytes, base: str) -> list[Series]:
    try:
        answer = msgspec.json.decode(content, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PrometheusError(f"{base}: the answer is not that of Prometheus's API ({error})") from error
    if answer.status != "success" or answer.data is None:
        raise PrometheusError(f"{base}: the query failed{_reason(content)}")
    if len(answer.data.result) > SERIES_MAX:
        raise PrometheusError(f"{base}: {len(answer.data.result):,} series, the maximum is {SERIES_MAX:,}")
    try:
        return [_series(stream) for stream in answer.data.result]
    except ValueError as error:
        raise PrometheusError(f"{base}: a sample is not a number ({error})") from error


def _series(stream: _Stream) -> Series:
    samples = sorted(Sample(at_s, float(value)) for at_s, value in stream.values)
    labels = {label: _printable(words) for label, words in stream.metric.items()}
    return Series(labels.get("__name__", ""), labels, tuple(samples))


def _printable(words: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in words[:LABEL_LETTERS_MAX])
