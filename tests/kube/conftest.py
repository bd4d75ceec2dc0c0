"""The control plane that all tests of this folder share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cascade.errors import LocalPartError
from tests.kube import build
from tests.kube.control_plane import ControlPlane
from tests.kube.kubectl import Kubectl
from tests.kube.manifests import volumes

LOG_LINES = 12
# three for the workers of each set of manifests that a test applies
VOLUMES = 64


@pytest.fixture(scope="session")
def part() -> Callable[[str], Path]:
    """The folder of a built part, by its name; a test fails where the part is not built."""

    def find(name: str) -> Path:
        try:
            return build.built(name)
        except LocalPartError as error:
            pytest.fail(str(error), pytrace=False)

    return find


@pytest.fixture(scope="session")
def control_plane(part: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that knows the custom resources of KEDA, the Prometheus operator and Strimzi."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.fail("servers of this test would be reachable from outside; run it by `make kube-test`", pytrace=False)
    lab, stages, definitions = part("lab"), part("stages"), part("crds")
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), lab, stages) as running:
        running.kubectl("apply", "--server-side", *(f"--filename={file}" for file in definitions.glob("*.yaml")))
        running.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        running.kubectl.apply(volumes(VOLUMES))
        yield running


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """kubectl as the cluster's administrator."""
    return control_plane.kubectl


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Adds the control plane's logs to the report of a test that fails."""
    report = yield
    plane = getattr(item, "funcargs", {}).get("control_plane")
    if report.failed and plane is not None:
        report.sections.append(("logs of the control plane", plane.log_tails(LOG_LINES)))
    return report
