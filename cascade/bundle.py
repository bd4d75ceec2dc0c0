"""The bundle: a directory with one version of everything that a decision depends on.

    manifest.json       format, version, and size and SHA-256 of each file below
    schema.toml         fields of a transaction
    features.toml       features
    screener.txt        the screener, LightGBM's text format
    escalation.txt      the model of the escalation rule `gain`, LightGBM's text format
    deep.onnx           the deep model
    deep.json           its inputs, outputs and shapes
    policy.json         calibrations and thresholds
    validation.parquet  scores of the validation rows, for `cascade recalibrate`
    report.json         how it was trained, and its figures on the validation data
    report.html         the report as a page; optional
    certificate.json    what later data shows of it (`cascade certify`); optional

The last four decide nothing and are no part of the version. All files are text, ONNX or Parquet, so loading a bundle
executes nothing. `load_bundle` reads every file once, compares it with the manifest, and returns the bytes that it
compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec

from cascade.certificate import Certificate, parse_certificate
from cascade.errors import BundleError
from cascade.features.spec import FeatureSpec, parse_spec
from cascade.local_parts import staged_directory
from cascade.policy import Policy
from cascade.readable import readable
from cascade.schema import Schema, parse_schema

BUNDLE_FORMAT = 2
MANIFEST = "manifest.json"
# Trained on the simulated world (`make bundle`), with the small deep model and with the large one.
SHIPPED_BUNDLE, SHIPPED_LARGE_BUNDLE = (
    Path(str(files("cascade") / "bundles" / name)) for name in ("simulator-small", "simulator")
)
# A decision depends on these, so they make up the version.
DECIDING_FILES = (
    "schema.toml",
    "features.toml",
    "screener.txt",
    "escalation.txt",
    "deep.onnx",
    "deep.json",
    "policy.json",
)
FILES = (*DECIDING_FILES, "validation.parquet", "report.json")
CERTIFICATE, REPORT_PAGE = "certificate.json", "report.html"
# A bundle is complete without them.
OPTIONAL_FILES = (CERTIFICATE, REPORT_PAGE)
# A screener of 1,000 trees has 5 MB, a deep model of a million weights 4 MB.
FILE_BYTES_MAX = 256 * 1024 * 1024
MANIFEST_BYTES_MAX = 64 * 1024


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of a file."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of `manifest.json`. `version`: the bundle's name and the start of the hash of DECIDING_FILES."""

    format: int
    name: str
    version: str
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory, verified against its manifest. `content`: the bytes of each file, by name."""

    directory: Path
    manifest: Manifest
    content: Mapping[str, bytes]
    schema: Schema
    spec: FeatureSpec
    policy: Policy

    @property
    def version(self) -> str:
        """The bundle's version, which decisions and ledger record."""
        return self.manifest.version

    def certificate(self) -> Certificate | None:
        """The bundle's certificate; None without one. Raises BundleError if it is of another bundle or release."""
        content = self.content.get(CERTIFICATE)
        if content is None:
            return None
        return parse_certificate(content, self.version, str(self.directory / CERTIFICATE))


def write_bundle(directory: Path, name: str, content: Mapping[str, bytes]) -> Manifest:
    """Write a bundle of the given files (`content`: bytes by file name); replace an existing bundle as a whole.

    Raises BundleError if a file is missing or unknown.
    """
    if _odd_files(content):
        raise BundleError(f"{directory}: a bundle consists of {', '.join(FILES)}; got {', '.join(sorted(content))}")
    files = bundle_files(content)
    entries = {file: FileEntry(len(content[file]), hashlib.sha256(content[file]).hexdigest()) for file in files}
    manifest = Manifest(BUNDLE_FORMAT, name, version_of(name, content), entries)
    with staged_directory(Path(directory)) as staged:
        for file in files:
            (staged / file).write_bytes(content[file])
        (staged / MANIFEST).write_bytes(readable(manifest))
    return manifest


def version_of(name: str, content: Mapping[str, bytes]) -> str:
    """The version of a bundle: its name and the start of the hash of its DECIDING_FILES."""
    hashes = "".join(hashlib.sha256(content[file]).hexdigest() for file in DECIDING_FILES)
    return f"{name}-{hashlib.sha256(hashes.encode()).hexdigest()[:12]}"


def add_certificate(bundle: Bundle, certificate: Certificate) -> Manifest:
    """Write the bundle again, as a whole, with this certificate in place of an earlier one; its version stays.

    Raises OSError if its directory cannot be replaced.
    """
    content = {**bundle.content, CERTIFICATE: certificate.to_json()}
    return write_bundle(bundle.directory, bundle.manifest.name, content)


def bundle_files(found: Collection[str]) -> list[str]:
    """The names of the bundle's files among those of a manifest: all of FILES, and the optional ones that are there."""
    return [*FILES, *(file for file in OPTIONAL_FILES if file in found)]


def load_bundle(directory: Path) -> Bundle:
    """Read and verify a bundle. Raises BundleError or SettingError, one line with the problem and the remedy."""
    directory = Path(directory)
    manifest = _read_manifest(directory)
    content = {file: _read_checked(directory, file, manifest.files[file]) for file in bundle_files(manifest.files)}
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
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Parse the content of a manifest of FILES, and perhaps optional ones. Raises BundleError, which names `path`."""
    try:
        format_only = msgspec.json.decode(raw)["format"]
    except (msgspec.MsgspecError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: is not a manifest; copy the bundle again from where it was trained") from error
    if format_only != BUNDLE_FORMAT:
        raise BundleError(
            f"{path}: bundle format {format_only!r} is unknown to this release, which reads"
            f" {BUNDLE_FORMAT}; upgrade Cascade or train the bundle again"
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}: {error}; copy the bundle again from where it was trained") from error
    odd = _odd_files(manifest.files)
    if odd:
        raise BundleError(f"{path}: missing or unknown files {', '.join(odd)}; train the bundle again")
    for file, entry in manifest.files.items():
        if not 0 <= entry.size_bytes <= FILE_BYTES_MAX:
            problem = f"{file} would have {entry.size_bytes} bytes, at most {FILE_BYTES_MAX} are allowed"
            raise BundleError(f"{path}: {problem}; train the bundle again")
    return manifest


def _odd_files(found: Collection[str]) -> list[str]:
    """Files that are missing or unknown, sorted."""
    return sorted((set(found) ^ set(FILES)) - set(OPTIONAL_FILES))


def _read_checked(directory: Path, file: str, entry: FileEntry) -> bytes:
    path = directory / file
    try:
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise BundleError(
                f"{path}: has {size} bytes and should have {entry.size_bytes}; the file was cut short or altered: copy"
                " the bundle again"
            )
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{path}: SHA-256 differs from the manifest; the file was altered: copy the bundle again")
    return content
