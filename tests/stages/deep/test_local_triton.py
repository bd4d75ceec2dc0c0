"""The embedded Triton starts with installed parts, reports why it cannot, and ends with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from cascade.errors import LocalPartError
from stages.deep import local_triton
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from tests.conftest import TinyDeepModel

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
OWNER = """
import sys, time
from pathlib import Path
from stages.deep.local_triton import LocalTriton
triton = LocalTriton(Path(sys.argv[1]), parts_dir=Path(sys.argv[2]))
triton.start()
print(triton.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.triton
def test_installing_again_changes_nothing(triton_parts: Path) -> None:
    marker = triton_parts / "triton" / "installed.json"
    before = marker.stat().st_mtime_ns
    lines: list[str] = []
    local_triton.install(triton_parts, lines.append)
    assert marker.stat().st_mtime_ns == before
    assert len(lines) == 1
    assert "present" in lines[0]
    assert local_triton.missing_parts(triton_parts) is None


@pytest.mark.triton
def test_metrics_page_counts_the_model(triton: LocalTriton) -> None:
    with urllib.request.urlopen(triton.metrics_url, timeout=5) as page:  # noqa: S310 - a local address
        assert b'nv_inference_request_success{model="fraud_deep"' in page.read()


def test_parts_that_are_not_installed_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LocalPartError, match=r"Triton .* is not installed in .*; run `cascade local install`"):
        LocalTriton(tmp_path, parts_dir=tmp_path).start()


@pytest.mark.triton
def test_a_directory_without_models_is_named(triton_parts: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalPartError, match="has no model"):
        LocalTriton(tmp_path, parts_dir=triton_parts).start()


@pytest.mark.triton
def test_a_model_that_cannot_be_loaded_is_one_line_with_the_cause(
    triton_parts: Path, tiny_deep_model: TinyDeepModel, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    repository = write_repository(broken, tiny_deep_model.signature, tmp_path / "models", "cpu")
    with pytest.raises(LocalPartError, match=r"ended while starting.*(INVALID_PROTOBUF|InvalidProtobuf)") as caught:
        LocalTriton(repository, parts_dir=triton_parts).start()
    assert "\n" not in str(caught.value)


@pytest.mark.triton
def test_killing_leaves_no_shared_memory(triton_parts: Path, repository: Path) -> None:
    with LocalTriton(repository, parts_dir=triton_parts) as running:
        # other Tritons of this machine have regions of their own there
        regions = f"{running._region_prefix}*"
        assert list(SHARED_MEMORY.glob(regions))
        running.kill()
    assert list(SHARED_MEMORY.glob(regions)) == []


@pytest.mark.triton
def test_a_killed_owner_takes_triton_and_its_helpers_along(triton_parts: Path, repository: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(repository), str(triton_parts)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    server = psutil.Process(int(owner.stdout.readline()))
    family = [server, *server.children(recursive=True)]
    assert len(family) >= 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
