"""Snapshots of the feature state: so that a restart folds the last minute of the log, and not months.

A snapshot is the state after all records below certain offsets, one a partition. Each partition of it can be taken by
itself, by whichever worker has that partition next, where its committed offset is not below the snapshot's: what lies
between is folded again, and nothing is emitted for what is decided. One file a snapshot:

    CASCADE-SNAPSHOT, a line       so that nothing else is taken for one
    header as JSON, a line         offsets, hash of schema and features, SHA-256 of the rest
    arrays as NumPy's npz

A file that is torn, altered or foreign is passed over, with a warning, and the one before is used.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
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
from streaming.clients import Partition
from streaming.files import Files

log = structlog.get_logger()
MAGIC = b"CASCADE-SNAPSHOT 2\n"
SUFFIX = ".snapshot"
HEADER_BYTES_MAX = 1 << 20
# Enough for the files of many workers; more than this in one place is another thing's directory.
FILES_MAX = 10_000
Positions = dict[Partition, int]
Submit = Callable[[Callable[[], None]], Future[None]]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a snapshot is of: the offsets of the next record of each partition that it does not hold.

    `committed`: where the commits of its transactions stood; decisions of later records may since have been made anew.
    `fingerprint`: of schema and features. `sha256` (hex) and `size_bytes`: of the arrays' bytes.
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
    """A state and the offsets that it stands at."""

    arrays: Mapping[str, Array]
    transactions: Positions
    labels: Positions
    committed: Positions


def fingerprint(bundle: Bundle) -> str:
    """Of what decides the state's content: schema, features, layout. Models may change, and the state stays good."""
    content = (bundle.content["schema.toml"], bundle.content["features.toml"], str(STATE_LAYOUT).encode())
    return hashlib.sha256(b"\0".join(content)).hexdigest()


class SnapshotStore:
    """The snapshots in one place, of all workers: of each partition the newest `keep` stay.

    `mark`: the fingerprint. `name`: of this worker, so that two never write the same file. `submit` runs the writing
    beside the loop: one thread, or, in a simulation, none.
    """

    def __init__(self, files: Files, keep: int, mark: str, name: str, clock: Clock, submit: Submit) -> None:
        self._files, self._keep, self._mark, self._name = files, keep, mark, name
        self._clock = clock
        self._submit = submit
        self._working: Future[None] | None = None
        self._headers: dict[str, Header] = {}
        self._distrusted: set[str] = set()
        self._passed_over: set[str] = set()
        self._newest_ms = 0

    @property
    def busy(self) -> bool:
        """Whether work in the background is not done yet."""
        return self._working is not None and not self._working.done()

    def save(self, snapshot: Snapshot) -> Future[None]:
        """Write it in the background; the arrays may not change until then. A failure is logged: the log is there."""
        return self.prepare(lambda: self._write(snapshot))

    def prepare(self, work: Callable[[], None]) -> Future[None]:
        """Do something in the background; `busy` until it is done."""
        self._working = self._submit(work)
        return self._working

    def candidates(self, committed: Positions, beginnings: Positions) -> dict[Partition, list[str]]:
        """For each partition the snapshots that can serve it, those of the latest offsets first.

        `committed`: offsets below which all is decided; a snapshot beyond holds records that may have to be scored
        again. `beginnings`: the first offsets, of transactions and labels, that the log still holds. Raises StateError
        where there are snapshots and none can serve, being distrusted, ahead, or of offsets before what the log holds,
        and the log is not whole: the state cannot be what it was, and that is for the operator to decide.
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
                    problem = _cut_short(name, partition, beginnings.get(partition, 0))
                else:
                    problem = _lost(name, partition, offset, header, beginnings)
                if problem:
                    gone = gone or problem
                elif name not in self._distrusted and offset <= until:
                    fitting.append((offset, header.created_ms, name))
            if gone and not fitting:
                raise StateError(gone)
            found[partition] = [name for _, _, name in sorted(fitting, reverse=True)]
        return found

    def load(self, name: str) -> Snapshot | None:
        """Read and verify one; None, with a warning, where it is damaged or gone."""
        try:
            return _decoded(self._files.read(name), self._mark)
        except (StateError, OSError) as error:
            self.distrust(name, str(error))
            return None

    def distrust(self, name: str, reason: str) -> None:
        """One cannot be used, for `reason`: it is no candidate any more."""
        log.warning("snapshot passed over", file=name, reason=reason)
        self._distrusted.add(name)

    def finish(self, timeout_s: float) -> bool:
        """Wait for what is being written; False where that takes longer."""
        try:
            if self._working is not None:
                self._working.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def _write(self, snapshot: Snapshot) -> None:
        started_s = self._clock.monotonic()
        try:
            created_ms = self._new_time_ms()
            octets = _encoded(snapshot, self._mark, created_ms)
            self._files.write(self._file(created_ms), octets)
            for old in self._superfluous():
                self._files.remove(old)
        except OSError as error:
            log.warning("snapshot not written", reason=f"{type(error).__name__}: {error}")
            return
        seconds = round(self._clock.monotonic() - started_s, 2)
        log.info("snapshot written", megabytes=round(len(octets) / 1e6, 1), seconds=seconds)

    def _new_time_ms(self) -> int:
        """Now, or the next ms that no file of ours has in its name.

        What was read of a file stays true of its name, also where two are written at once, or clocks go back.
        """
        taken = set(self._files.names())
        self._newest_ms = max(int(self._clock.time() * 1e3), self._newest_ms + 1)
        while self._file(self._newest_ms) in taken:
            self._newest_ms += 1
        return self._newest_ms

    def _file(self, created_ms: int) -> str:
        return f"{created_ms:015d}-{self._name}{SUFFIX}"

    def _superfluous(self) -> list[str]:
        """Files that are not among the `keep` of the latest offsets for any of their partitions.

        Those that are ahead of what was committed, as far as the files tell, can serve no start yet, so of the others
        as many stay. Those of other fingerprints are left alone. Offsets tell what is later; clocks may jump.
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
        """Headers of our fingerprint, by file; files are never altered, so each is read once."""
        names = sorted((name for name in self._files.names() if name.endswith(SUFFIX)), reverse=True)[:FILES_MAX]
        headers: dict[str, Header] = {}
        for name in names:
            try:
                header = self._headers.get(name) or _header(self._files.read_start(name, HEADER_BYTES_MAX), self._mark)
            except (StateError, OSError) as error:
                if name not in self._passed_over:
                    log.warning("snapshot passed over", file=name, reason=str(error))
                self._passed_over.add(name)
                continue
            headers[name] = header
        self._headers = headers
        self._distrusted &= headers.keys()
        self._passed_over &= set(names)
        return headers


def _lost(name: str, partition: Partition, offset: int, header: Header, beginnings: Positions) -> str:
    """What of the log a start from this snapshot would need and no longer find, as a line; empty where nothing."""
    for place, needed in ((partition, offset), *_positions(header.labels).items()):
        if beginnings.get(place, 0) > needed:
            return (
                f"snapshot {name} ends at offset {needed} of {place[0]}-{place[1]}, whose log now begins at"
                f" {beginnings[place]}: what lies between is lost. Delete the snapshots to go on with what the"
                " log holds, or restore the log; then raise the topic's retention"
            )
    return ""


def _cut_short(name: str, partition: Partition, beginning: int) -> str:
    """What is lost of a partition by a snapshot that cannot be used, as a line; empty where the log holds it all."""
    if beginning == 0:
        return ""
    return (
        f"snapshot {name} cannot be used, and the log of {partition[0]}-{partition[1]} begins at {beginning}: what lies"
        " before is lost. Delete the snapshots to go on with what the log holds, or restore one; then keep more of them"
        " (state.keep)"
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
        raise StateError("not a snapshot of this format")
    end = octets.find(b"\n", len(MAGIC), len(MAGIC) + HEADER_BYTES_MAX)
    try:
        header = msgspec.json.decode(octets[len(MAGIC) : max(end, len(MAGIC))], type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"its header cannot be read ({error})") from error
    if header.fingerprint != mark:
        raise StateError("it is of another schema or other features")
    return header


def _decoded(octets: bytes, mark: str) -> Snapshot:
    header = _header(octets, mark)
    payload = memoryview(octets)[octets.find(b"\n", len(MAGIC)) + 1 :]
    if len(payload) != header.size_bytes or hashlib.sha256(payload).hexdigest() != header.sha256:
        raise StateError("it is torn or altered: its checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    return Snapshot(
        arrays, _positions(header.transactions), _positions(header.labels), _positions(header.committed)
    )  # fmt: skip


def _listed(positions: Positions) -> list[tuple[str, int, int]]:
    return sorted((topic, number, offset) for (topic, number), offset in positions.items())


def _positions(listed: Iterable[tuple[str, int, int]]) -> Positions:
    return {(topic, number): offset for topic, number, offset in listed}
