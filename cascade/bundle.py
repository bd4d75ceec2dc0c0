"""The bundle: one directory is one version of everything that makes decisions.

    manifest.json     format, version, and size and SHA-256 of each file below
    schema.toml       fields of a transaction
    features.toml     features
    screener.txt      the screener, LightGBM's text format
    deep.onnx         the deep model
    deep.json         its inputs, outputs and shapes
    policy.json       calibrations and thresholds
    report.json       how it was trained, and its figures on the validation data

Text and ONNX only. A bundle is read as a whole and each file checked against the manifest before anything of it is
used; what is checked is what is used (the bytes are kept, not the paths).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec

from cascade.errors import BundleError
from cascade.features.spec import FeatureSpec, parse_spec
from cascade.local_parts import staged_directory
from cascade.policy import Policy
from cascade.schema import Schema, parse_schema

BUNDLE_FORMAT = 1
MANIFEST = "manifest.json"
SHIPPED_BUNDLE = Path(str(files("cascade") / "bundles" / "simulator"))
FILES = ("schema.toml", "features.toml", "screener.txt", "deep.onnx", "deep.json", "policy.json", "report.json")
# A screener of 1,000 trees is 5 MB, a deep model of a million weights 4 MB: past this it is something else.
FILE_BYTES_MAX = 256 * 1024 * 1024


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of one file."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle is: `version` is its name and the start of the hash of its content."""

    format: int
    name: str
    version: str
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory, verified: what it holds is what its manifest says."""

    directory: Path
    manifest: Manifest
    content: Mapping[str, bytes]
    schema: Schema
    spec: FeatureSpec
    policy: Policy

    @property
    def version(self) -> str:
        """The bundle's version, as decisions and ledger name it."""
        return self.manifest.version


def write_bundle(directory: Path, name: str, content: Mapping[str, bytes]) -> Manifest:
    """Write a bundle of the given files; an existing bundle there is replaced as a whole.

    Raises BundleError where a file is missing or unknown.
    """
    if set(content) != set(FILES):
        raise BundleError(f"{directory}: a bundle holds {', '.join(FILES)}; got {', '.join(sorted(content))}")
    entries = {file: FileEntry(len(content[file]), hashlib.sha256(content[file]).hexdigest()) for file in FILES}
    digest = hashlib.sha256("".join(entry.sha256 for entry in entries.values()).encode()).hexdigest()
    manifest = Manifest(BUNDLE_FORMAT, name, f"{name}-{digest[:12]}", entries)
    with staged_directory(Path(directory)) as staged:
        for file in FILES:
            (staged / file).write_bytes(content[file])
        (staged / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return manifest


def load_bundle(directory: Path) -> Bundle:
    """Read and verify a bundle; raises BundleError, one line that says what is wrong and what to do."""
    directory = Path(directory)
    manifest = _read_manifest(directory)
    content = {file: _read_checked(directory, file, manifest.files[file]) for file in FILES}
    schema = parse_schema(content["schema.toml"], str(directory / "schema.toml"))
    spec = parse_spec(content["features.toml"], str(directory / "features.toml"))
    policy_path = str(directory / "policy.json")
    try:
        policy = msgspec.json.decode(content["policy.json"], type=Policy)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{policy_path}: {error}; train the bundle again with this release") from error
    policy.check(policy_path)
    return Bundle(directory, manifest, content, schema, spec, policy)


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}); point bundle.path at a directory that `cascade train` wrote"
        ) from error
    try:
        format_only = msgspec.json.decode(raw)["format"]
    except (msgspec.MsgspecError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: is no manifest; copy the bundle again from where it was trained") from error
    if format_only != BUNDLE_FORMAT:
        raise BundleError(
            f"{path}: bundle format {format_only!r} is unknown to this release, which reads"
            f" {BUNDLE_FORMAT}; upgrade Cascade or train the bundle again"
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}: {error}; copy the bundle again from where it was trained") from error
    if set(manifest.files) != set(FILES):
        odd = sorted(set(manifest.files) ^ set(FILES))
        raise BundleError(f"{path}: missing or unknown files {', '.join(odd)}; train the bundle again")
    return manifest


def _read_checked(directory: Path, file: str, entry: FileEntry) -> bytes:
    path = directory / file
    try:
        size = path.stat().st_size
        if size != entry.size_bytes or size > FILE_BYTES_MAX:
            raise BundleError(
                f"{path}: {size} bytes, the manifest says {entry.size_bytes}; the file was cut short or"
                " altered: copy the bundle again"
            )
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{path}: SHA-256 differs from the manifest; the file was altered: copy the bundle again")
    return content
