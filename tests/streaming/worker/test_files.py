"""The place for files, on a real directory; the full disk is injected."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from streaming.worker.files import UNFINISHED_MAX, FsspecFiles


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FsspecFiles(str(tmp_path))
    whole = LocalFileSystem.pipe_file

    def half(self: LocalFileSystem, path: str, value: bytes) -> None:
        whole(self, path, value[: len(value) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    with pytest.raises(OSError, match="No space left"):
        place.write("one.snapshot", b"x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_unfinished_is_removed_at_a_later_start(tmp_path: Path) -> None:
    old, young, whole = (tmp_path / name for name in ("old.part", "young.part", "whole"))
    before_s = time.time() - UNFINISHED_MAX.total_seconds() - 60
    for path in (old, young, whole):
        path.write_bytes(b"x")
    for path in (old, whole):
        os.utime(path, (before_s, before_s))
    place = FsspecFiles(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "young.part"]
    assert place.names() == ["whole"]


def test_an_object_store_without_a_file_yet_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    # as S3 has no folders
    monkeypatch.setattr(MemoryFileSystem, "makedirs", lambda *_, **__: None)
    place = FsspecFiles("memory://bucket-of-test-files/state")
    assert place.names() == []
    place.write("one.snapshot", b"x")
    assert place.names() == ["one.snapshot"]
