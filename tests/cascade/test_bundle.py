from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade.bundle import (
    BUNDLE_FORMAT,
    CERTIFICATE,
    DECIDING_FILES,
    FILES,
    MANIFEST,
    SHIPPED_BUNDLE,
    add_certificate,
    load_bundle,
    write_bundle,
)
from cascade.errors import BundleError, CascadeError
from tests.bundle_certificate import made_up_certificate


@pytest.fixture
def content() -> dict[str, bytes]:
    return {file: (SHIPPED_BUNDLE / file).read_bytes() for file in FILES}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle"))


def refusal(directory: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(directory)
    line = str(caught.value)
    assert "\n" not in line
    assert str(directory) in line
    assert ";" in line or ":" in line.removeprefix(str(directory)), "no remedy"
    return line


def change_manifest(directory: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((directory / MANIFEST).read_bytes())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_what_is_written_is_what_is_read(tmp_path: Path, content: dict[str, bytes]) -> None:
    manifest = write_bundle(tmp_path / "deeper" / "bundle", "mine", content)
    bundle = load_bundle(tmp_path / "deeper" / "bundle")
    assert bundle.manifest == manifest
    assert dict(bundle.content) == content
    assert bundle.version == manifest.version
    assert bundle.version.startswith("mine-")
    assert (bundle.schema.name, bundle.policy.escalation.budget) == ("simulator", 0.01)
    assert {path.name for path in (tmp_path / "deeper" / "bundle").iterdir()} == {MANIFEST, *FILES}


def test_the_version_is_a_function_of_the_content(tmp_path: Path, content: dict[str, bytes]) -> None:
    first = write_bundle(tmp_path / "one", "mine", content).version
    again = write_bundle(tmp_path / "two", "mine", dict(reversed(list(content.items())))).version
    assert first == again
    others = {
        write_bundle(tmp_path / "three", "mine", content | {file: content[file] + b"\n"}).version
        for file in DECIDING_FILES
    }
    assert len(others | {first}) == len(DECIDING_FILES) + 1
    swapped = content | {"schema.toml": content["features.toml"], "features.toml": content["schema.toml"]}
    assert write_bundle(tmp_path / "four", "mine", swapped).version != first


def test_times_that_the_report_measured_do_not_change_the_version(tmp_path: Path, content: dict[str, bytes]) -> None:
    versions, hashes = set(), set()
    for us in (b"1.25", b"1.26"):
        manifest = write_bundle(tmp_path / "bundle", "mine", content | {"report.json": b'{"us_per_row": %s}' % us})
        versions.add(manifest.version)
        hashes.add(manifest.files["report.json"].sha256)
    assert (len(versions), len(hashes)) == (1, 2)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_one_changed_byte_is_found(copy: Path, file: str, where: float) -> None:
    octets = bytearray((copy / file).read_bytes())
    octets[int(where * (len(octets) - 1))] ^= 1
    (copy / file).write_bytes(octets)
    assert f"{file}: SHA-256 differs" in refusal(copy)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_file_is_found(copy: Path, file: str, share: float) -> None:
    octets = (copy / file).read_bytes()
    (copy / file).write_bytes(octets[: int(share * len(octets))])
    assert f"should have {len(octets)}" in refusal(copy)


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_missing_file_or_a_directory_in_its_place_is_named(copy: Path, file: str) -> None:
    assert "cascade train" in refusal(copy / "nowhere")
    (copy / file).unlink()
    assert f"{file}: cannot be read (No such file or directory)" in refusal(copy)
    (copy / file).mkdir()
    assert file in refusal(copy)


@pytest.mark.parametrize("number", [0, 1, BUNDLE_FORMAT + 1, "1", None, [1]])
def test_an_unknown_format_is_refused_before_the_rest_is_read(copy: Path, number: object) -> None:
    change_manifest(copy, lambda manifest: manifest.update(format=number, news="from a later release"))
    assert "is unknown to this release" in refusal(copy)


@pytest.mark.parametrize("octets", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"files": {}}', b"format = 1"])
def test_a_manifest_that_is_none_is_refused(copy: Path, octets: bytes) -> None:
    (copy / MANIFEST).write_bytes(octets)
    assert "is not a manifest" in refusal(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("version"),
        lambda manifest: manifest.update(version=3),
        lambda manifest: manifest.update(extra=1),
        lambda manifest: manifest["files"].update({"deep.onnx": {"size_bytes": "12", "sha256": ""}}),
        lambda manifest: manifest["files"]["deep.onnx"].pop("sha256"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(copy: Path, change: Callable[[dict], object]) -> None:
    change_manifest(copy, change)
    assert MANIFEST in refusal(copy)


def test_a_manifest_without_a_file_or_with_another_file_is_refused(copy: Path) -> None:
    change_manifest(copy, lambda manifest: manifest["files"].pop("policy.json"))
    assert "missing or unknown files policy.json" in refusal(copy)
    entry = {"size_bytes": 1, "sha256": "00"}
    change_manifest(copy, lambda manifest: manifest["files"].update({"policy.json": entry, "../../etc/passwd": entry}))
    assert "missing or unknown files ../../etc/passwd" in refusal(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("escalation", {"budget": 1.5, "rule": "gain", "threshold": 0.0}),
        ("escalation", {"budget": 0.01, "rule": "band", "threshold": 0.0}),
        ("escalation", {"rule": "gain", "threshold": 0.0}),
        ("escalation_budget", 0.01),  # of the format before
        ("combined", {"screener": 1.0, "deep": -1.0, "intercept": 0.0}),
        ("costs", {"review": 5.0}),
        ("review_from", "0.1"),
        ("review_from", None),
        ("unknown", 1),
    ],
)
def test_values_that_are_no_policy_are_refused(
    tmp_path: Path, content: dict[str, bytes], key: str, value: object
) -> None:
    policy = json.dumps(json.loads(content["policy.json"]) | {key: value})
    write_bundle(tmp_path / "bundle", "mine", content | {"policy.json": policy.encode()})
    assert "policy.json" in refusal(tmp_path / "bundle")


@pytest.mark.parametrize("file", ["schema.toml", "features.toml", "policy.json"])
def test_garbage_under_a_right_checksum_is_one_line(tmp_path: Path, content: dict[str, bytes], file: str) -> None:
    write_bundle(tmp_path / "bundle", "mine", content | {file: b"\x00 garbage"})
    with pytest.raises(CascadeError) as caught:
        load_bundle(tmp_path / "bundle")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"notes.txt": b""}, {"deep.onnx": None}])
def test_files_that_are_no_bundle_are_not_written(
    tmp_path: Path, content: dict[str, bytes], change: dict[str, bytes | None]
) -> None:
    odd = {file: octets for file, octets in (content | change).items() if octets is not None}
    with pytest.raises(BundleError, match="a bundle consists of"):
        write_bundle(tmp_path / "bundle", "mine", odd)
    assert list(tmp_path.iterdir()) == []


def test_writing_replaces_the_whole_of_an_older_bundle(tmp_path: Path, content: dict[str, bytes]) -> None:
    old = write_bundle(tmp_path / "bundle", "old", content)
    (tmp_path / "bundle" / "left.over").write_bytes(b"from the old bundle")
    new = write_bundle(tmp_path / "bundle", "new", content | {"report.json": b"{}"})
    assert load_bundle(tmp_path / "bundle").version == new.version != old.version
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (tmp_path / "bundle" / "left.over").exists()


def test_a_failed_write_leaves_the_older_bundle_and_no_debris(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_bundle(tmp_path / "bundle", "old", content)
    write_bytes = Path.write_bytes

    def failing_on_the_last_file(self: Path, octets: bytes) -> int:
        if self.name == FILES[-1]:
            raise OSError(28, "No space left on device")
        return write_bytes(self, octets)

    monkeypatch.setattr(Path, "write_bytes", failing_on_the_last_file)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(tmp_path / "bundle", "new", content)
    monkeypatch.undo()
    assert load_bundle(tmp_path / "bundle").version == old.version
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_was_verified_is_what_is_used(copy: Path) -> None:
    bundle = load_bundle(copy)
    before = bundle.content["screener.txt"]
    (copy / "screener.txt").write_bytes(b"replaced after the check")
    assert bundle.content["screener.txt"] == before


def test_a_certificate_becomes_a_part_of_the_bundle_and_not_of_its_version(
    tmp_path: Path, content: dict[str, bytes]
) -> None:
    write_bundle(tmp_path / "bundle", "mine", content)
    before = load_bundle(tmp_path / "bundle")
    assert before.certificate() is None
    certificate = made_up_certificate(before.version)
    add_certificate(before, certificate)
    after = load_bundle(tmp_path / "bundle")
    assert after.certificate() == certificate
    assert after.version == before.version
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {MANIFEST, CERTIFICATE, *FILES}
    another = made_up_certificate(before.version, caught=51)
    add_certificate(after, another)
    assert load_bundle(tmp_path / "bundle").certificate() == another


def test_an_altered_certificate_is_found_and_one_of_another_bundle_is_refused(copy: Path) -> None:
    bundle = load_bundle(copy)
    add_certificate(bundle, made_up_certificate(bundle.version))
    octets = bytearray((copy / CERTIFICATE).read_bytes())
    octets[len(octets) // 2] ^= 1
    (copy / CERTIFICATE).write_bytes(octets)
    assert f"{CERTIFICATE}: SHA-256 differs" in refusal(copy)
    add_certificate(bundle, made_up_certificate("other-0123456789ab"))
    with pytest.raises(BundleError, match="is of bundle other-0123456789ab, not of") as caught:
        load_bundle(copy).certificate()
    assert "\n" not in str(caught.value)


def test_a_certificate_that_the_manifest_does_not_name_does_not_count(copy: Path) -> None:
    (copy / CERTIFICATE).write_bytes(b"not in the manifest")
    assert load_bundle(copy).certificate() is None
