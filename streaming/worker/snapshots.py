"""Snapshots of the feature state, so that a restart folds the last minute of the log and not months.

A snapshot is the state after all records below an offset of each partition. A worker restores only the partitions that
it is assigned, from a snapshot whose offset is not above the committed one, and folds the records between the two
again, without a decision. The file of a snapshot:

    CASCADE-SNAPSHOT, a line       identifies the format
    header as JSON, a line         offsets, hash of schema and features, SHA-256 of the rest
    arrays as NumPy's npz

A truncated, altered or foreign file is ignored with a warning, and the previous snapshot is used.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import structlog

from cascade.bundle import Bundle
from cascade.columns import Array
from cascade.errors import StateError
from cascade.features.layout import STATE_LAYOUT
from cascade.protocols import Clock
from streaming.kafka import Partition
from streaming.worker.files import Files

log = structlog.get_logger()
MAGIC = b"CASCADE-SNAPSHOT 2\n"
SUFFIX = ".snapshot"
HEADER_BYTES_MAX = 1 << 20
# Enough for many workers; a directory with more files is used for something else.
FILES_MAX = 10_000
Positions = dict[Partition, int]
Submit = Callable[[Callable[[], None]], Future[None]]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a snapshot: for each partition the offset of the first record that it does not contain.

    `committed`: the committed offsets at that time; later records may have been decided again since. `fingerprint`: of
    schema and features. `sha256` (hex) and `size_bytes`: of the arrays' bytes.
    """

    fingerprint: str
    transactions: list[tuple[str, int, int]]
    labels: list[tuple[str, int, int]]
    committed: list[tuple[str, int, int]]
    created_ms: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state and its offsets."""

    arrays: Mapping[str, Array]
    transactions: Positions
    labels: Positions
    committed: Positions


def fingerprint(bundle: Bundle) -> str:
    """Returns a hash of schema, features and state layout. Other models can use the same state."""
    content = (bundle.content["schema.toml"], bundle.content["features.toml"], str(STATE_LAYOUT).encode())
    return hashlib.sha256(b"\0".join(content)).hexdigest()


class SnapshotStore:
    """The snapshots of all workers, in a directory or an object store.

    files: the place. keep: how many snapshots of each partition stay. mark: the fingerprint of this service's bundle.
    name: of this worker, part of its file names. clock: for file names and durations. submit: runs a write, in another
    thread than the loop's.
    """

    def __init__(self, files: Files, keep: int, mark: str, name: str, clock: Clock, submit: Submit) -> None:
        self._files, self._keep, self._mark, self._name = files, keep, mark, name
        self._clock = clock
        self._submit = submit
        self._working: Future[None] | None = None
        self._headers: dict[str, Header] = {}
        self._distrusted: set[str] = set()
        self._ignored: set[str] = set()
        self._newest_ms = 0
        self._reading: Future[None] | None = None
        self._read: tuple[str, Snapshot | None] = ("", None)

    @property
    def busy(self) -> bool:
        """Whether a background task is unfinished."""
        return self._working is not None and not self._working.done()

    def save(self, snapshot: Snapshot) -> Future[None]:
        """Writes a snapshot in the background; the arrays must not change until then. Logs a failure."""
        return self.prepare(lambda: self._write(snapshot))

    def prepare(self, work: Callable[[], None]) -> Future[None]:
        """Runs `work` in the background; `busy` until it is finished."""
        self._working = self._submit(work)
        return self._working

    def candidates(self, committed: Positions, beginnings: Positions) -> dict[Partition, list[str]]:
        """Returns, for each partition, the snapshots that can be restored, those with the latest offsets first.

        committed: committed offsets; a snapshot beyond contains records that may have to be decided again. beginnings:
        the first offsets of the logs of transactions and labels.

        Raises StateError if there are snapshots, none can be restored, and the log was truncated: the previous state
        cannot be rebuilt, and the operator must decide.
        """
        headers = self._known_headers()
        found: dict[Partition, list[str]] = {}
        for partition, until in committed.items():
            fitting: list[tuple[int, int, str]] = []
            gone = ""
            for name, header in headers.items():
                offset = _positions(header.transactions).get(partition)
                if offset is None:
                    continue
                if name in self._distrusted or offset > until:
                    gone = gone or _cut_short(name, partition, beginnings.get(partition, 0))
                elif problem := _lost(name, partition, offset, header, beginnings):
                    gone = gone or problem
                else:
                    fitting.append((offset, header.created_ms, name))
            if gone and not fitting:
                raise StateError(gone)
            found[partition] = [name for _, _, name in sorted(fitting, reverse=True)]
        return found

    def newest_of(self, partitions: Collection[Partition]) -> str | None:
        """Returns the newest snapshot that has one of these partitions, whatever its offset; None if there is none."""
        wanted = set(partitions)
        names = [
            name for name, header in self._known_headers().items() if wanted & _positions(header.transactions).keys()
        ]
        return max(names, default=None)

    def write(self, snapshot: Snapshot) -> bytes:
        """Writes a snapshot in this thread, and returns its content; raises OSError."""
        created_ms = self._new_time_ms()
        octets = _encoded(snapshot, self._mark, created_ms)
        self._files.write(self._file(created_ms), octets)
        return octets

    def read_ahead(self) -> None:
        """Begins to read the newest snapshot of this worker's name in the background.

        A worker that comes back as the same static member will restore it, if no other worker had its partitions
        meanwhile, and reads it while it connects.
        """
        self._reading = self._submit(self._read_newest)

    def _read_newest(self) -> None:
        try:
            own = [name for name in self._files.names() if name.endswith(f"-{self._name}{SUFFIX}")]
            if own:
                self._read = (max(own), None)
                self._read = (max(own), _decoded(self._files.read(max(own)), self._mark))
        except (StateError, OSError) as error:
            # `load` warns, if the snapshot is needed
            log.debug("snapshot not read ahead", reason=str(error))

    def _take_read(self, name: str) -> Snapshot | None:
        """Returns a snapshot that is being read ahead; forgets any other."""
        reading, self._reading = self._reading, None
        if reading is not None and self._read[0] in ("", name):
            reading.result()
        found, self._read = self._read, ("", None)
        return found[1] if found[0] == name else None

    def load(self, name: str) -> Snapshot | None:
        """Reads and verifies a snapshot; None, with a warning, if it is damaged or deleted."""
        read = self._take_read(name)
        if read is not None:
            return read
        try:
            return _decoded(self._files.read(name), self._mark)
        except (StateError, OSError) as error:
            self.distrust(name, str(error))
            return None

    def distrust(self, name: str, reason: str) -> None:
        """Excludes a snapshot from the candidates, with a warning."""
        log.warning("snapshot ignored", file=name, reason=reason)
        self._distrusted.add(name)

    def finish(self, timeout_s: float) -> bool:
        """Waits for the background task; False if it takes longer than `timeout_s`."""
        try:
            if self._working is not None:
                self._working.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def _write(self, snapshot: Snapshot) -> None:
        started_s = self._clock.monotonic()
        try:
            octets = self.write(snapshot)
            for old in self._superfluous():
                self._files.remove(old)
        except OSError as error:
            log.warning("snapshot not written", reason=f"{type(error).__name__}: {error}")
            return
        seconds = round(self._clock.monotonic() - started_s, 2)
        log.info("snapshot written", megabytes=round(len(octets) / 1e6, 1), seconds=seconds)

    def _new_time_ms(self) -> int:
        """Returns the time, or the next ms that no file of this worker has in its name.

        Files are never overwritten, even if clocks go back: their headers are cached by name.
        """
        taken = set(self._files.names())
        self._newest_ms = max(int(self._clock.time() * 1e3), self._newest_ms + 1)
        while self._file(self._newest_ms) in taken:
            self._newest_ms += 1
        return self._newest_ms

    def _file(self, created_ms: int) -> str:
        return f"{created_ms:015d}-{self._name}{SUFFIX}"

    def _superfluous(self) -> list[str]:
        """Returns the files that are not among the latest `keep` for any of their partitions, by offset.

        Snapshots ahead of the committed offsets, as far as the files show these, cannot be restored yet; so the latest
        `keep` of the others stay too. Files of other fingerprints stay.
        """
        headers = self._known_headers()
        by_partition: dict[Partition, list[tuple[int, int, str]]] = {}
        committed: Positions = {}
        for name, header in headers.items():
            known = _positions(header.committed)
            for topic, number, offset in header.transactions:
                partition = (topic, number)
                by_partition.setdefault(partition, []).append((offset, header.created_ms, name))
                committed[partition] = max(committed.get(partition, 0), known.get(partition, offset))
        needed: set[str] = set()
        for partition, found in by_partition.items():
            ahead = sorted((entry for entry in found if entry[0] > committed[partition]), reverse=True)
            usable = sorted((entry for entry in found if entry[0] <= committed[partition]), reverse=True)
            needed |= {name for _, _, name in ahead[: self._keep] + usable[: self._keep]}
        return [name for name in headers if name not in needed]

    def _known_headers(self) -> dict[str, Header]:
        """Headers with this service's fingerprint, by file; each is read once, since files never change."""
        names = sorted((name for name in self._files.names() if name.endswith(SUFFIX)), reverse=True)[:FILES_MAX]
        headers: dict[str, Header] = {}
        for name in names:
            try:
                header = self._headers.get(name) or _header(self._files.read_start(name, HEADER_BYTES_MAX), self._mark)
            except (StateError, OSError) as error:
                if name not in self._ignored:
                    log.warning("snapshot ignored", file=name, reason=str(error))
                self._ignored.add(name)
                continue
            headers[name] = header
        self._headers = headers
        self._distrusted &= headers.keys()
        self._ignored &= set(names)
        return headers


def _lost(name: str, partition: Partition, offset: int, header: Header, beginnings: Positions) -> str:
    """The error if the log has lost records that this snapshot needs, as a line; else empty."""
    for (topic, partition_id), needed in ((partition, offset), *_positions(header.labels).items()):
        beginning = beginnings.get((topic, partition_id), 0)
        if beginning > needed:
            return (
                f"snapshot {name} ends at offset {needed} of {topic}-{partition_id}, whose log now begins at offset"
                f" {beginning}: the records between are lost. Delete the snapshots to continue without them, or restore"
                " the log; then raise the topic's retention"
            )
    return ""


def _cut_short(name: str, partition: Partition, beginning: int) -> str:
    """The error if a snapshot cannot be used and the log was truncated, as a line; else empty."""
    if beginning == 0:
        return ""
    return (
        f"snapshot {name} cannot be used, and the log of {partition[0]}-{partition[1]} begins at offset {beginning}:"
        " the records before it are lost. Delete the snapshots to continue without them, or restore another snapshot;"
        " then raise state.keep"
    )


def _encoded(snapshot: Snapshot, mark: str, created_ms: int) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(snapshot.arrays)
    np.savez(buffer, **arrays)
    payload = buffer.getvalue()
    header = Header(
        fingerprint=mark, transactions=_listed(snapshot.transactions), labels=_listed(snapshot.labels),
        committed=_listed(snapshot.committed), created_ms=created_ms, size_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )  # fmt: skip
    return MAGIC + msgspec.json.encode(header) + b"\n" + payload


def _header(octets: bytes, mark: str) -> Header:
    if not octets.startswith(MAGIC):
        raise StateError("it is not a snapshot of this version")
    end = octets.find(b"\n", len(MAGIC), len(MAGIC) + HEADER_BYTES_MAX)
    try:
        header = msgspec.json.decode(octets[len(MAGIC) : max(end, len(MAGIC))], type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"its header cannot be read ({error})") from error
    if header.fingerprint != mark:
        raise StateError("it was taken with another schema or other features")
    return header


def _decoded(octets: bytes, mark: str) -> Snapshot:
    header = _header(octets, mark)
    payload = memoryview(octets)[octets.find(b"\n", len(MAGIC)) + 1 :]
    if len(payload) != header.size_bytes or hashlib.sha256(payload).hexdigest() != header.sha256:
        raise StateError("it is truncated or altered: its checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    snapshot = Snapshot(
        arrays, _positions(header.transactions), _positions(header.labels), _positions(header.committed)
    )
    _check_offsets(header, snapshot)
    return snapshot


def _check_offsets(header: Header, snapshot: Snapshot) -> None:
    """Raises StateError unless each partition has one offset, and none is below a committed one of its own."""
    for listed, positions in ((header.transactions, snapshot.transactions), (header.labels, snapshot.labels)):
        if len(positions) < len(listed) or any(offset < 0 for offset in positions.values()):
            raise StateError("its offsets are not in order: a partition has two, or a negative one")
    for partition, offset in snapshot.committed.items():
        if offset > snapshot.transactions.get(partition, -1):
            raise StateError(
                f"its offsets are not in order: {partition[0]}-{partition[1]} was committed up to {offset}, and the"
                f" state ends at {snapshot.transactions.get(partition)}"
            )


def _listed(positions: Positions) -> list[tuple[str, int, int]]:
    return sorted((topic, number, offset) for (topic, number), offset in positions.items())


def _positions(listed: Iterable[tuple[str, int, int]]) -> Positions:
    return {(topic, number): offset for topic, number, offset in listed}
