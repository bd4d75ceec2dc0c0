"""A bundle is fetched whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cascade import cli
from cascade.bundle import FILES, MANIFEST, MANIFEST_BYTES_MAX, SHIPPED_BUNDLE, add_certificate, load_bundle
from cascade.errors import BundleError, CascadeError
from streaming.service.bundle_fetch import fetch_bundle
from tests.bundle_certificate import made_up_certificate

PINNED = hashlib.sha256((SHIPPED_BUNDLE / MANIFEST).read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "source"))


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where an older bundle is."""
    directory = tmp_path / "volume" / "bundle"
    directory.mkdir(parents=True)
    (directory / "old").write_text("old")
    return directory


@pytest.fixture
def stored() -> Iterator[str]:
    """The URL of the bundle in an object store."""
    store, url = fsspec.filesystem("memory"), "memory://bucket-of-bundles/simulator"
    for file in SHIPPED_BUNDLE.iterdir():
        store.pipe_file(f"bucket-of-bundles/simulator/{file.name}", file.read_bytes())
    yield url
    store.rm("bucket-of-bundles", recursive=True)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / MANIFEST).read_bytes())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def refusal(source: str | Path, destination: Path, manifest_sha256: str = "") -> str:
    """The line with which a bundle is refused; an earlier one stays, and nothing is left beside it."""
    with pytest.raises(CascadeError) as caught:
        fetch_bundle(str(source), destination, manifest_sha256)
    assert content(destination) == {"old": b"old"}
    assert list(destination.parent.iterdir()) == [destination]
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_directory_is_copied_and_replaces_the_old_bundle_as_a_whole(
    source: Path, destination: Path, form: str
) -> None:
    (source / "notes.txt").write_text("not of the bundle")
    before = content(source)
    bundle = fetch_bundle(form.format(source), destination, PINNED)
    assert content(destination) == content(SHIPPED_BUNDLE)
    assert bundle.directory == destination
    assert content(source) == before
    assert list(destination.parent.iterdir()) == [destination]


def test_an_object_store_is_read_by_its_url(stored: str, tmp_path: Path) -> None:
    destination = tmp_path / "volume" / "deeper" / "bundle"
    assert fetch_bundle(stored, destination, PINNED.upper()).version == load_bundle(SHIPPED_BUNDLE).version
    assert content(destination) == content(SHIPPED_BUNDLE)


def test_only_the_pinned_bundle_is_taken(source: Path, destination: Path) -> None:
    change_manifest(source, lambda manifest: manifest.update(name="another"))
    line = refusal(source, destination, PINNED)
    assert PINNED in line
    assert "another bundle than the pinned one" in line


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_was_altered_or_cut_or_prolonged_is_refused(source: Path, destination: Path, file: str) -> None:
    octets = (source / file).read_bytes()
    (source / file).write_bytes(octets[:-1] + b"\0")
    assert f"{source / file}: SHA-256 differs from the manifest" in refusal(source, destination)
    (source / file).write_bytes(octets[:-1])
    assert f"{source / file}: has {len(octets) - 1} bytes and should have {len(octets)}" in refusal(source, destination)
    (source / file).write_bytes(octets + b"\0")
    assert f"{file}: has more than {len(octets)} bytes" in refusal(source, destination)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "more.txt"])
def test_a_manifest_with_other_files_is_refused_before_any_is_read(source: Path, destination: Path, name: str) -> None:
    entry = {"size_bytes": 1, "sha256": "0" * 64}
    change_manifest(source, lambda manifest: manifest["files"].update({name: entry}))
    assert f"missing or unknown files {name}" in refusal(source, destination)


def test_sizes_are_limited(source: Path, destination: Path) -> None:
    change_manifest(source, lambda manifest: manifest["files"]["deep.onnx"].update(size_bytes=10**12))
    assert "deep.onnx would have 1000000000000 bytes" in refusal(source, destination)
    (source / MANIFEST).write_bytes(b" " * (MANIFEST_BYTES_MAX + 1))
    assert f"manifest.json: has more than {MANIFEST_BYTES_MAX} bytes" in refusal(source, destination)


def test_what_cannot_be_read_is_named(source: Path, destination: Path, stored: str) -> None:
    assert "absent/manifest.json: cannot be read" in refusal(source / "absent", destination)
    (source / "deep.onnx").unlink()
    assert "deep.onnx: cannot be read" in refusal(source, destination)
    assert "memory://bucket-of-bundles/other/manifest.json: cannot be read" in refusal(
        stored.replace("simulator", "other"), destination
    )
    line = refusal("no-such-store://bucket/bundle", destination)
    assert line.startswith("no-such-store://bucket/bundle: cannot be read (")
    assert "s3fs for s3://" in line


def test_a_destination_that_cannot_be_replaced_is_one_line_with_the_remedy(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")  # as the kernel answers for a mount point

    monkeypatch.setattr(Path, "rename", busy)
    line = refusal(source, destination)
    assert line.startswith(f"{destination}: cannot be written (Device or resource busy); ")
    assert f"name a directory below it, {destination / 'new'} for example" in line


def test_the_commands_print_the_version_and_what_pins_it(
    source: Path, destination: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bundle", "fetch", str(source), str(destination)]) == 0
    version = load_bundle(SHIPPED_BUNDLE).version
    printed = f"{destination}: bundle {version}, verified; manifest-sha256 {PINNED}\n"
    assert capsys.readouterr().out == printed
    assert cli.main(["bundle", "verify", str(destination)]) == 0
    assert capsys.readouterr().out == printed
    (destination / "policy.json").write_bytes(b"{}")
    assert cli.main(["bundle", "verify", str(destination)]) == 1
    assert capsys.readouterr().err.startswith("cascade bundle: ")


def test_a_pin_that_is_no_hash_is_wrong_usage(
    source: Path, destination: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bundle", "fetch", str(source), str(destination), "--manifest-sha256", "abc"]) == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err
    assert content(destination) == {"old": b"old"}


def test_an_error_within_a_file_of_the_bundle_is_found_before_it_is_replaced(source: Path, destination: Path) -> None:
    octets = b"not a schema"
    (source / "schema.toml").write_bytes(octets)
    entry = {"size_bytes": len(octets), "sha256": hashlib.sha256(octets).hexdigest()}
    change_manifest(source, lambda manifest: manifest["files"].update({"schema.toml": entry}))
    assert "schema.toml" in refusal(source, destination)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path, destination: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        fetch_bundle(str(tmp_path), destination)


def test_a_certificate_is_fetched_with_its_bundle(source: Path, destination: Path) -> None:
    bundle = load_bundle(source)
    certificate = made_up_certificate(bundle.version)
    add_certificate(bundle, certificate)
    assert fetch_bundle(str(source), destination).certificate() == certificate
    assert content(destination) == content(source)
