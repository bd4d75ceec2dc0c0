"""Snapshots of the feature state: so that a restart folds the last minute of the log, and not months.

A snapshot is the state after all records below certain offsets. It serves a start whose committed offsets are not below
those: what lies between is folded again, and nothing is emitted for what is decided. One file a snapshot:

    CASCADE-SNAPSHOT, a line       so that nothing else is taken for one
    header as JSON, a line         offsets, hash of schema and features, SHA-256 of the rest
    arrays as NumPy's npz

Files are written under another name and then renamed. A file that is torn, altered or foreign is passed over, with a
warning, and the one before is used.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import msgspec
import numpy as np
import structlog

from cascade.bundle import Bundle
from cascade.columns import Array
from cascade.errors import SettingError, StateError
from streaming.clients import Partition

log = structlog.get_logger()
MAGIC = b"CASCADE-SNAPSHOT 1\n"
SUFFIX = ".snapshot"
HEADER_BYTES_MAX = 1 << 20
Positions = dict[Partition, int]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a snapshot is of: the offsets of the next record of each partition that it does not hold.

    `fingerprint`: of schema and features. `sha256` (hex) and `size_bytes`: of the arrays' bytes.
    """

    fingerprint: str
    transactions: list[tuple[str, int, int]]
    labels: list[tuple[str, int, int]]
    created_ms: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state and the offsets that it stands at."""

    arrays: Mapping[str, Array]
    transactions: Positions
    labels: Positions


def fingerprint(bundle: Bundle) -> str:
    """Of what decides the state's content: schema and features. Models may change, and the state stays good."""
    return hashlib.sha256(bundle.content["schema.toml"] + b"\0" + bundle.content["features.toml"]).hexdigest()


class SnapshotStore:
    """The snapshots below a directory or URL, the newest `keep` of them; writes in a thread of its own."""

    def __init__(self, url: str, keep: int, mark: str) -> None:
        """`mark`: the fingerprint. Raises SettingError where the place cannot be used."""
        self._keep, self._mark = keep, mark
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise SettingError(
                "configuration",
                "state.snapshots",
                url,
                f"cannot be used ({error})",
                "name a directory or URL to write to",
            ) from error
        self._thread = ThreadPoolExecutor(1, "cascade-snapshots")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, snapshot: Snapshot) -> Future[None]:
        """Write it in the background; the arrays may not change until then. A failure is logged: the log is there."""
        return self.prepare(lambda: self._write(snapshot))

    def prepare(self, work: Callable[[], None]) -> Future[None]:
        """Do something in the writer's thread; `busy` until it is done."""
        self._writing = self._thread.submit(work)
        return self._writing

    def _write(self, snapshot: Snapshot) -> None:
        started_s = time.monotonic()
        try:
            octets = _encoded(snapshot, self._mark)
            # zero-padded, so that names are in order of time
            name = f"{self._root}/{time.time_ns():020d}{SUFFIX}"
            self._fs.pipe_file(f"{name}.part", octets)
            self._fs.mv(f"{name}.part", name)
            for old in self._names()[self._keep :]:
                self._fs.rm(old)
        except Exception as error:
            log.warning("snapshot not written", reason=f"{type(error).__name__}: {error}")
            return
        log.info(
            "snapshot written", megabytes=round(len(octets) / 1e6, 1), seconds=round(time.monotonic() - started_s, 2)
        )

    def newest(self, committed: Positions, beginnings: Positions) -> Snapshot | None:
        """The newest good one of exactly these partitions that is not ahead of what is committed.

        `beginnings`: the first offsets, of transactions and labels, that the log still holds. Raises StateError where
        only the log's part between a snapshot and now is gone: that is for the operator to decide.
        """
        gone = None
        for name in self._names():
            try:
                snapshot = self._read(name)
            except (StateError, OSError) as error:
                log.warning("snapshot passed over", file=name, reason=str(error))
                continue
            if snapshot.transactions.keys() != committed.keys():
                continue
            if any(offset > committed[partition] for partition, offset in snapshot.transactions.items()):
                continue
            places = snapshot.transactions | snapshot.labels
            missing = [one for one, offset in places.items() if beginnings.get(one, 0) > offset]
            if not missing:
                return snapshot
            topic, number = missing[0]
            gone = gone or (
                f"snapshot {name} ends at offset {places[missing[0]]} of {topic}-{number}, whose log now begins at"
                f" {beginnings[missing[0]]}: what lies between is lost. Delete the snapshots to go on with what the"
                " log holds, or restore the log; then raise the topic's retention"
            )
        if gone is not None:
            raise StateError(gone)
        return None

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown()

    def _names(self) -> list[str]:
        """Files of snapshots, newest first."""
        self._fs.invalidate_cache()
        return sorted((name for name in self._fs.ls(self._root, detail=False) if name.endswith(SUFFIX)), reverse=True)

    def _read(self, name: str) -> Snapshot:
        octets: bytes = self._fs.cat_file(name)
        return _decoded(octets, self._mark)


def _encoded(snapshot: Snapshot, mark: str) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(snapshot.arrays)
    np.savez(buffer, **arrays)
    payload = buffer.getvalue()
    header = Header(
        fingerprint=mark, transactions=_listed(snapshot.transactions), labels=_listed(snapshot.labels),
        created_ms=int(time.time() * 1e3), size_bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest(),
    )  # fmt: skip
    return MAGIC + msgspec.json.encode(header) + b"\n" + payload


def _decoded(octets: bytes, mark: str) -> Snapshot:
    if not octets.startswith(MAGIC):
        raise StateError("not a snapshot of this format")
    end = octets.find(b"\n", len(MAGIC), len(MAGIC) + HEADER_BYTES_MAX)
    try:
        header = msgspec.json.decode(octets[len(MAGIC) : max(end, len(MAGIC))], type=Header)
    except msgspec.MsgspecError as error:
        raise StateError(f"its header cannot be read ({error})") from error
    if header.fingerprint != mark:
        raise StateError("it is of another schema or other features")
    payload = memoryview(octets)[end + 1 :]
    if len(payload) != header.size_bytes or hashlib.sha256(payload).hexdigest() != header.sha256:
        raise StateError("it is torn or altered: its checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    return Snapshot(arrays, _positions(header.transactions), _positions(header.labels))


def _listed(positions: Positions) -> list[tuple[str, int, int]]:
    return sorted((topic, number, offset) for (topic, number), offset in positions.items())


def _positions(listed: Iterable[tuple[str, int, int]]) -> Positions:
    return {(topic, number): offset for topic, number, offset in listed}
