"""The service on a real node, from `kubectl apply` through disturbances under load to the judgement of its topics.

Each test goes on where the one before it ended. The topics alone decide: nothing is lost, the order of each card holds,
and with exactly-once nothing is decided twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from tests.kube.kubectl import KubectlError, Object
from tests.kube.node.cluster import LOCAL, NAMESPACE, TRITON, WORKER, Cluster, Report, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300, func_only=True)]  # the first one waits for the node
REPORT = Path("build/cluster/recovery.json")
SLICE = "nvidia.com/mig-1g.5gb"
# Two cores carry all of it: the test is about losses and recovery, not about the deadline.
LOCAL_TOML = (LOCAL / "cascade.toml").read_text()
GENEROUS = "\n[deadline]\nbudget_ms = 2000\n"
EXACTLY_ONCE = f'delivery = "exactly-once"\n{LOCAL_TOML}{GENEROUS}'
WRONG = EXACTLY_ONCE.replace("[terminals]\nshare = true", '[terminals]\nshare = "always"')
WITH_SLICE: Object = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "triton"},
    "spec": {
        "template": {"spec": {"containers": [{"name": "triton", "resources": {"limits": {SLICE: 1}}}]}},
    },
}
ESCALATING = {"name": "cascade-bundle", "newTag": "escalating"}
IMAGE_MB_MAX = 900
INSPECT = """
import importlib.util, os, shutil
tools = ("gcc", "cc", "ld", "pip", "pip3", "uv", "curl", "wget")
size, root = 0, os.stat("/").st_dev
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_dev == root]
    size += sum(os.lstat(os.path.join(folder, name)).st_size for name in files)
print(os.getuid(), [tool for tool in tools if shutil.which(tool)], sep="\\n")
print(importlib.util.find_spec("pip"), size / 1e6, sep="\\n")
"""
# In a worker's container: processes that are smaller than the worker, and together larger than its limit.
HOG = """
import os, time
for _ in range(24):
    if os.fork() == 0:
        held = b"1" * (160 << 20)
        time.sleep(60)
time.sleep(60)
"""


def test_the_overlay_local_as_a_user_applies_it(cluster: Cluster) -> None:
    cluster.apply(LOCAL)
    until(lambda: _job_succeeded(cluster), "the topics' Job", cluster)
    cluster.wait_rolled_out()
    cluster.start_load()
    with cluster.case("first decisions"):
        cluster.wait_until_decided("the first transactions")


def test_the_image_as_it_runs(cluster: Cluster) -> None:
    found = cluster.inside(WORKER, "python", "-c", INSPECT).split("\n")
    user, tools, pip, megabytes = found
    assert user == "10001"
    assert tools == "[]"
    assert pip == "None"
    assert float(megabytes) <= IMAGE_MB_MAX
    # the root is read-only: the worker has found what the build compiled
    assert msgspec.json.decode(cluster.inside(WORKER, "cascade", "compile", "--json"))["compiled"] == 0
    components = msgspec.json.decode(cluster.inside(WORKER, "cat", "/usr/share/cascade/sbom.json"))["components"]
    assert {"numpy", "lightgbm", "cascade-fraud"} <= {component["name"] for component in components}


def test_at_least_once_a_killed_worker_comes_back(cluster: Cluster) -> None:
    with cluster.case("SIGKILL in the worker's container"):
        _signal(cluster, WORKER, "SIGKILL")
    assert cluster.container(WORKER)["lastState"]["terminated"]["exitCode"] == 137


def test_at_least_once_a_deleted_worker_ends_in_order(cluster: Cluster) -> None:
    with cluster.expect_exit_codes({"cascade-worker-0": 0}), cluster.case("SIGTERM of the worker's pod"):
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", "cascade-worker-0")
        cluster.wait_ready(WORKER, 1)


def test_a_changed_configuration_rolls_the_worker(cluster: Cluster) -> None:
    with cluster.case("rolling update, to exactly-once"):
        cluster.deploy(EXACTLY_ONCE)
        cluster.wait_rolled_out()


def test_a_killed_worker_comes_back(cluster: Cluster) -> None:
    with cluster.case("SIGKILL in the worker's container"):
        _signal(cluster, WORKER, "SIGKILL")
    assert cluster.container(WORKER)["lastState"]["terminated"]["exitCode"] == 137


def test_liveness_restarts_a_frozen_worker(cluster: Cluster) -> None:
    with cluster.case("SIGSTOP in the worker's container"):
        _signal(cluster, WORKER, "SIGSTOP")


def test_triton_rolls_to_replicas_that_hold_a_slice_each(cluster: Cluster) -> None:
    cluster.node.run("fake-mig", "fake-mig", f"-resource={SLICE}", "-count=2")
    until(lambda: _allocatable(cluster) == "2", "two slices on the node", cluster)
    with cluster.case("rolling update of Triton, 1 to 2, on slices"):
        cluster.deploy(EXACTLY_ONCE, tritons=2, patches=[WITH_SLICE])
        cluster.wait_rolled_out()
    seen = {_visible_devices(cluster, pod) for pod in cluster.pods(TRITON)}
    assert len(seen) == 2
    assert all(device.startswith("MIG-") for device in seen)


def test_no_pod_without_a_slice(cluster: Cluster) -> None:
    cluster.scale("deployment/triton", 3)
    until(lambda: f"Insufficient {SLICE}" in _why_pending(cluster), "a pod without a slice", cluster)
    cluster.scale("deployment/triton", 2)
    cluster.wait_ready(TRITON, 2)


def test_one_of_two_tritons_is_killed(cluster: Cluster) -> None:
    with cluster.case("SIGKILL in one of two Tritons"):
        _signal(cluster, TRITON, "SIGKILL", pods=2)


def test_triton_gone_and_back(cluster: Cluster) -> None:
    with cluster.case("Triton gone (scaled to 0)"):
        cluster.scale("deployment/triton", 0)
        cluster.wait_ready(TRITON, 0)
        cluster.wait_until_decided("without Triton")
    with cluster.case("Triton back"):
        cluster.scale("deployment/triton", 2)
        cluster.wait_ready(TRITON, 2)


def test_a_new_bundle(cluster: Cluster) -> None:
    with cluster.case("new bundle, workers and Triton"):
        cluster.deploy(EXACTLY_ONCE, tritons=2, images=[ESCALATING], patches=[WITH_SLICE])
        cluster.wait_rolled_out()


def test_a_triton_less_and_one_more(cluster: Cluster) -> None:
    with cluster.case("a Triton less, 2 to 1"):
        cluster.scale("deployment/triton", 1)
        cluster.wait_ready(TRITON, 1)
    with cluster.case("a Triton added, 1 to 2"):
        cluster.add_triton()
        cluster.wait_ready(TRITON, 2)


def test_out_of_memory(cluster: Cluster) -> None:
    def fill() -> None:
        with suppress(KubectlError):  # its container dies
            cluster.inside(WORKER, "python", "-c", HOG)

    with cluster.case("out of memory in the worker's container"):
        _strike(cluster, WORKER, fill)
    assert cluster.container(WORKER)["lastState"]["terminated"]["reason"] == "OOMKilled"


def test_scale_to_three(cluster: Cluster) -> None:
    with cluster.case("scale 1 to 3"):
        cluster.scale("statefulset/cascade-worker", 3)
        cluster.wait_ready(WORKER, 3)


def test_a_wrong_configuration_leaves_the_old_pods(cluster: Cluster) -> None:
    before = [_life(pod) for pod in cluster.pods(WORKER)[:2]]
    with cluster.case("a wrong ConfigMap, then the right one"):
        cluster.deploy(WRONG, workers=3, tritons=2, images=[ESCALATING], patches=[WITH_SLICE])
        until(lambda: _refused(cluster), "a pod that refuses its configuration", cluster)
        cluster.wait_until_decided("with a wrong configuration")
        assert [_life(pod) for pod in cluster.pods(WORKER)[:2]] == before
        cluster.deploy(EXACTLY_ONCE, workers=3, tritons=2, images=[ESCALATING], patches=[WITH_SLICE])
        cluster.wait_ready(WORKER, 3)


def test_scale_to_one_within_the_grace_period(cluster: Cluster) -> None:
    ended = {"cascade-worker-1": 0, "cascade-worker-2": 0}
    with cluster.expect_exit_codes(ended), cluster.case("scale 3 to 1"):
        cluster.scale("statefulset/cascade-worker", 1)
        cluster.wait_ready(WORKER, 1)


def test_drain(cluster: Cluster) -> None:
    with cluster.case("drain of the worker's node"):
        selected = "--pod-selector=app.kubernetes.io/component=worker"
        cluster.kubectl("drain", "node", selected, "--delete-emptydir-data", "--timeout=80s")
        until(lambda: "unschedulable" in _why_pending(cluster, WORKER), "a pod that waits for a node", cluster)
        cluster.kubectl("uncordon", "node")
        cluster.wait_ready(WORKER, 1)


def test_the_topics_show_no_loss_the_order_and_repeats_only_with_at_least_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    report = cluster.end(REPORT)
    with capsys.disabled():
        _show(report)
    assert report.settled
    assert report.check.lost == 0
    assert report.check.strays == 0
    assert report.check.order_violations == 0
    assert all(each.repeats == 0 for each in report.cases if each.delivery == "exactly-once")
    assert report.check.repeats == sum(each.repeats for each in report.cases)
    assert len(report.bundles) == 2
    assert report.deep > 0
    assert all(each.transactions > 0 for each in report.cases)


def _signal(cluster: Cluster, component: str, name: str, pods: int = 1) -> None:
    container = str(cluster.container(component)["containerID"])
    _strike(cluster, component, lambda: cluster.node.signal(container, name), pods)


def _strike(cluster: Cluster, component: str, strike: Callable[[], None], pods: int = 1) -> None:
    """Strikes the part's first pod; waits until its container was started again, and until all its `pods` are ready."""
    before = _restarts(cluster.pods(component)[0])
    strike()
    until(lambda: _restarts(cluster.pods(component)[0]) > before, "a restart", cluster)
    cluster.wait_ready(component, pods)


def _job_succeeded(cluster: Cluster) -> bool:
    job: Object = cluster.kubectl.get("job", "cascade-topics", f"--namespace={NAMESPACE}")
    return bool(job["status"].get("succeeded"))


def _allocatable(cluster: Cluster) -> str:
    node: Object = cluster.kubectl.get("node", "node")
    return str(node["status"]["allocatable"].get(SLICE, "0"))


def _visible_devices(cluster: Cluster, pod: Object) -> str:
    command = ("exec", pod["metadata"]["name"], "--container=triton", "--", "printenv", "NVIDIA_VISIBLE_DEVICES")
    return cluster.kubectl("-n", NAMESPACE, *command).strip()


def _why_pending(cluster: Cluster, component: str = TRITON) -> str:
    waiting = [pod for pod in cluster.pods(component) if pod["status"]["phase"] == "Pending"]
    conditions = [condition for pod in waiting for condition in pod["status"].get("conditions", [])]
    return " ".join(str(condition.get("message", "")) for condition in conditions)


def _restarts(pod: Object) -> int:
    return sum(int(status["restartCount"]) for status in pod["status"].get("containerStatuses", []))


def _life(pod: Object) -> tuple[str, int]:
    return str(pod["metadata"]["uid"]), _restarts(pod)


def _refused(cluster: Cluster) -> bool:
    return any(_restarts(pod) > 0 for pod in cluster.pods(WORKER) if pod["metadata"]["name"] == "cascade-worker-2")


def _show(report: Report) -> None:
    checked, added = report.check, report.added
    table = Table(
        title=f"{checked.transactions} transactions, {checked.lost} lost, {checked.order_violations} out of order"
    )
    for column in ("case", "delivery"):
        table.add_column(column)
    for column in ("ready again, s", "repeats", "transactions", "longest wait, s", "escalated", "degraded"):
        table.add_column(column, justify="right")
    for each in report.cases:
        table.add_row(
            each.name,
            each.delivery,
            f"{each.ready_s:.1f}",
            str(each.repeats),
            str(each.transactions),
            f"{each.longest_wait_s:.2f}",
            f"{each.escalated_share:.2%}",
            f"{each.degraded_share:.2%}",
        )
    console = Console(width=130)
    console.print("", table)
    console.print(f"added Triton: ready {added.ready_s} s, in DNS {added.named_s} s, called {added.called_s} s after")
