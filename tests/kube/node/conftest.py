"""The node and the service that all tests of this folder share, in the order of their file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kube.node import images
from tests.kube.node.cluster import Cluster
from tests.kube.node.node import Node

LOG_LINES = 12


@pytest.fixture(scope="session")
def node(part: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with the images; it is up when its names resolve."""
    if reason := images.why_not_ready():
        pytest.fail(reason, pytrace=False)
    if "NODE_ADDRESS" not in os.environ:
        pytest.fail("a kubelet would change this machine; run it by `make cluster-test`", pytrace=False)
    directory = tmp_path_factory.mktemp("node")
    with Node(directory, part("lab"), part("dns"), part("stages"), images.folder()) as running:
        yield running


@pytest.fixture(scope="session")
def cluster(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The service on the node; the first test applies it."""
    with Cluster(node, tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Adds the logs of the node's programs to the report of a test that fails."""
    report = yield
    running = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and running is not None:
        report.sections.append(("logs of the node", running.node.log_tails(LOG_LINES)))
    return report
