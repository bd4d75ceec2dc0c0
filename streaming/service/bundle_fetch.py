"""Copies a bundle from a directory or a URL: verified, as a whole, and within limits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fsspec

from cascade.bundle import MANIFEST, MANIFEST_BYTES_MAX, Bundle, bundle_files, load_bundle, parse_manifest
from cascade.errors import BundleError, CascadeError
from cascade.local_parts import not_replaced, staged_directory

CHUNK_BYTES = 1024 * 1024


def fetch_bundle(source: str, destination: Path, manifest_sha256: str = "") -> Bundle:
    """Copies the bundle at `source` to `destination`, and returns it; an existing directory is replaced as a whole.

    source: a directory, or a URL that fsspec reads. manifest_sha256: of the manifest (hex), which has the hashes of all
    other files, so that it stands for exactly one bundle; empty: any.

    Copies the files that a bundle consists of and no others, none beyond the size in the manifest. Raises CascadeError;
    `destination` is then unchanged.
    """
    place = _Place(source)
    raw = place.read(MANIFEST, MANIFEST_BYTES_MAX)
    found = hashlib.sha256(raw).hexdigest()
    if manifest_sha256 and found != manifest_sha256.lower():
        raise BundleError(
            f"{place.path(MANIFEST)}: has the SHA-256 {found}, not {manifest_sha256}; this is another bundle than the"
            " pinned one"
        )
    manifest = parse_manifest(raw, place.path(MANIFEST))
    try:
        with staged_directory(destination) as staged:
            (staged / MANIFEST).write_bytes(raw)
            for file in bundle_files(manifest.files):
                (staged / file).write_bytes(place.read(file, manifest.files[file].size_bytes))
            _verify(staged, source)
    except OSError as error:
        raise not_replaced(destination, error) from error
    return load_bundle(destination)


def _verify(staged: Path, source: str) -> None:
    """Loads the staged bundle; raises its error with the address of the source, since the staged files are removed."""
    try:
        load_bundle(staged)
    except CascadeError as error:
        raise BundleError(str(error).replace(str(staged), source.rstrip("/"))) from error


class _Place:
    """The files of a directory or below a URL; raises BundleError for what cannot be read."""

    def __init__(self, source: str) -> None:
        self._source = source.rstrip("/")
        self._root = ""
        self._fs: Any = None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self._source)
        except (OSError, ValueError, ImportError) as error:
            remedy = (
                "name a directory or a URL whose fsspec package is installed (s3fs for s3://, aiohttp for https://)"
            )
            raise BundleError(f"{source}: cannot be read ({_line(error)}); {remedy}") from error

    def path(self, name: str) -> str:
        """The address of a file, for messages."""
        return f"{self._source}/{name}"

    def read(self, name: str, size_max: int) -> bytes:
        """The whole file; raises BundleError if it has more than `size_max` bytes."""
        content = bytearray()
        try:
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                while len(content) <= size_max and (chunk := file.read(CHUNK_BYTES)):
                    content += chunk
        # each store has errors of its own, and not all are an OSError
        except Exception as error:
            raise BundleError(
                f"{self.path(name)}: cannot be read ({_line(error)}); check address and credentials of the bundle"
            ) from error
        if len(content) > size_max:
            raise BundleError(f"{self.path(name)}: has more than {size_max} bytes; copy the bundle again")
        return bytes(content)


def _line(error: BaseException) -> str:
    """The reason on one line; without the path, which the message has already."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
