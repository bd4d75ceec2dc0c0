"""The service on a real node, under a steady load; its topics tell what each disturbance cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from bench.cluster import (
    Check,
    Follower,
    SteadyLoad,
    check,
    end_offsets,
    parse_decision_id,
    read_decisions,
    read_topic,
    read_transactions,
    simulated,
    wait_until_all_committed,
    write_json,
)
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Bool, Int64
from cascade.config import load_config
from streaming.clients import FetchedBatch
from streaming.decisions import decode_decision
from tests.kube.kubectl import KubectlError, Object
from tests.kube.node.node import Node
from tests.timing import wait_until

LOCAL = Path(__file__).parents[3] / "k8s" / "overlays" / "local"
NAMESPACE = "cascade"
WORKER, TRITON = "worker", "triton"
# Two cores carry the cluster, the service and the load.
RATE = 120.0
READY_S_MAX, RECOVERY_S_MAX, SETTLE_S_MAX = 150.0, 90.0, 120.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A disturbance. `ready_s`: from it until the pods were ready again as wanted, and every partition was decided.

    The topics tell the rest, about the transactions of that time (`transactions`): the longest time from a transaction
    to its decision, both as the broker appended them, and the share of degraded decisions.
    """

    name: str
    ready_s: float
    transactions: int
    longest_wait_s: float
    degraded_share: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the topics show at the end. `settled`: everything was decided and committed. `deep`: decided by Triton."""

    settled: bool
    check: Check
    deep: int
    cases: list[Case]
    bundles: list[str]


class Cluster:
    """The overlay `local` on a node, as a context manager; `directory` is for the kustomizations of the tests."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node, self.kubectl = node, node.kubectl
        self._directory = directory
        self._stack = ExitStack()
        self._windows: list[tuple[str, float, float, float]] = []
        self._schema = load_bundle(SHIPPED_BUNDLE).schema
        settings = directory / "judge.toml"
        settings.write_text('[kafka]\nbootstrap = "kafka:9092"\n')
        self.config = load_config(settings)
        self._load: SteadyLoad | None = None
        self._follower: Follower | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- the deployment

    def apply(self, folder: Path) -> None:
        """`kubectl apply -k`, after the topics' Job, which cannot be changed, is gone."""
        self.kubectl("-n", NAMESPACE, "delete", "job", "cascade-topics", "--ignore-not-found")
        self.kubectl("apply", "--server-side", "--force-conflicts", f"--kustomize={folder}")

    def deploy(
        self,
        configuration: str,
        workers: int = 1,
        tritons: int = 1,
        images: Sequence[Mapping[str, str]] = (),
        patches: Sequence[Object] = (),
    ) -> None:
        """Applies an overlay of one's own over `local`: another cascade.toml, replicas, images, patches."""
        folder = self._directory / "overlay"
        folder.mkdir(exist_ok=True)
        (folder / "cascade.toml").write_text(configuration)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            "resources": [os.path.relpath(LOCAL, folder.resolve())],
            "configMapGenerator": [{"name": "cascade-config", "behavior": "replace", "files": ["cascade.toml"]}],
            "replicas": [{"name": "cascade-worker", "count": workers}, {"name": TRITON, "count": tritons}],
            "images": list(images),
            "patches": [{"patch": msgspec.json.encode(patch).decode()} for patch in patches],
        }
        (folder / "kustomization.yaml").write_bytes(msgspec.json.encode(kustomization))
        self.apply(folder)

    def pods(self, component: str) -> list[Object]:
        """The pods of a part, by name."""
        found = self.kubectl.items(
            "pods", f"--namespace={NAMESPACE}", f"--selector=app.kubernetes.io/component={component}"
        )
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def container(self, component: str) -> Object:
        """The status of the container of the part's first pod."""
        status: Object = self.pods(component)[0]["status"]["containerStatuses"][0]
        return status

    def inside(self, component: str, *command: str) -> str:
        """What a command prints in the part's first pod."""
        name = str(self.pods(component)[0]["metadata"]["name"])
        return self.kubectl("-n", NAMESPACE, "exec", name, "--", *command).strip()

    def scale(self, kind: str, replicas: int) -> None:
        """Changes the number of replicas of `statefulset/...` or `deployment/...`."""
        self.kubectl("-n", NAMESPACE, "scale", kind, f"--replicas={replicas}")

    def wait_rolled_out(self) -> None:
        """Waits until worker and Triton have the replicas and the template that they should have, ready."""
        until(lambda: all(map(_is_rolled_out, self._workloads())), "the rolling update", self)

    def _workloads(self) -> list[Object]:
        return self.kubectl.items("statefulset/cascade-worker", "deployment/triton", f"--namespace={NAMESPACE}")

    def wait_ready(self, component: str, pods: int, timeout_s: float = READY_S_MAX) -> None:
        """Waits until the part has so many pods, none more, and all of them are ready."""

        def holds() -> bool:
            found = self.pods(component)
            return len(found) == pods and all(_is_ready(pod) for pod in found)

        wait_until(holds, f"{pods} ready pods of {component}", timeout_s, self.state)

    @contextmanager
    def watch_exit_codes(self, component: str) -> Iterator[dict[str, set[int]]]:
        """By pod, the exit codes with which containers end during the body, those of pods that go included."""
        codes: dict[str, set[int]] = {}
        exit_code = "{.status.containerStatuses[0].state.terminated.exitCode}"
        log = self._directory / "exit-codes"
        watch = self.kubectl.start(
            log,
            *("get", "pods", f"--namespace={NAMESPACE}", f"--selector=app.kubernetes.io/component={component}"),
            *("--watch", f"--output=jsonpath={{.metadata.name}} {exit_code}{{'\\n'}}"),
        )
        try:
            yield codes
        finally:
            watch.terminate()
            watch.wait()
            for line in log.read_text().splitlines():
                name, _, code = line.partition(" ")
                if code:
                    codes.setdefault(name, set()).add(int(code))

    def state(self) -> str:
        """What a user would look at: pods, events, the end of the logs."""
        shown = [
            self.kubectl("-n", NAMESPACE, "get", "pods", "--output=wide"),
            self.kubectl("-n", NAMESPACE, "get", "events", "--sort-by=.lastTimestamp")[-4_000:],
        ]
        for component in (WORKER, TRITON):
            selector = f"--selector=app.kubernetes.io/component={component}"
            try:
                shown.append(self.kubectl("-n", NAMESPACE, "logs", selector, "--all-containers", "--tail=12")[-4_000:])
            except KubectlError as error:
                shown.append(str(error))
        return "\n".join(shown)

    # --- the load, and what the topics show

    def start_load(self) -> None:
        """Starts to send, and to read the decisions."""
        data = simulated(self._schema, cards=2_000, terminals=500, days=30, seed=1)
        self._load = SteadyLoad(self.config, self._schema, data, RATE)
        self._follower = Follower(self.config)
        self._stack.callback(self._follower.close)
        self._load.start()

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A disturbance under load: the body strikes, and waits until the pods are as wanted again."""
        assert self._load is not None
        self._load.check()
        started_s, started = time.monotonic(), time.time()
        yield
        self.wait_until_decided(name)
        self._windows.append((name, started * 1e3, time.time() * 1e3, time.monotonic() - started_s))

    def wait_until_decided(self, what: str) -> None:
        """Waits until every partition has decisions about transactions that come from now on."""
        assert self._follower is not None
        watch = self._follower.watch(end_offsets(self.config, self.config.kafka.topics.transactions))
        wait_until(lambda: watch.done, f"{what}: decisions in every partition", RECOVERY_S_MAX, self.state)

    def end(self, path: Path) -> Report:
        """Ends the load, reads the topics from their beginning, and writes the report to `path`."""
        assert self._load is not None
        sent = self._load.stop()
        settled = wait_until_all_committed(self.config, SETTLE_S_MAX)
        logged, decided = read_transactions(self.config, self._schema), read_decisions(self.config)
        seen = self._read_visible()
        waits = _Waits.join(logged.partition, logged.offset, logged.appended_ms, seen)
        report = Report(
            settled=settled,
            check=check(logged, decided, sent),
            deep=int((~decided.screened & ~decided.degraded).sum()),
            cases=[waits.case(*window) for window in self._windows],
            bundles=sorted(set(seen.bundles)),
        )
        write_json(path, report)
        return report

    def _read_visible(self) -> _Visible:
        rows: list[tuple[int, int, int, bool]] = []
        bundles: list[str] = []

        def take(fetched: FetchedBatch) -> None:
            for value, appended_ms in zip(fetched.values, fetched.timestamps_ms, strict=True):
                decision = decode_decision(value or b"", self.config.kafka.codec)
                rows.append((*parse_decision_id(decision.decision_id), int(appended_ms), decision.degraded))
                bundles.append(decision.bundle)

        read_topic(self.config, self.config.kafka.topics.decisions, take)
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        return _Visible(columns[0], columns[1], columns[2], columns[3].astype(bool), bundles)


class _Visible(msgspec.Struct, frozen=True):
    """Decisions as the broker appended them, int64 and bool [decisions]."""

    partition: Int64
    offset: Int64
    appended_ms: Int64
    degraded: Bool
    bundles: list[str]


class _Waits(msgspec.Struct, frozen=True):
    """Each decided transaction, by the time of its first decision, int64 and bool [transactions]."""

    arrived_ms: Int64
    waited_ms: Int64
    degraded: Bool

    @classmethod
    def join(cls, partition: Int64, offset: Int64, arrived_ms: Int64, seen: _Visible) -> Self:
        """Transactions (partition, offset, arrival), each with the first decision about it."""
        codes, first = np.unique((seen.partition << 44) | seen.offset, return_index=True)
        transactions = (partition << 44) | offset
        row = np.searchsorted(codes, transactions).clip(max=len(codes) - 1)
        known = codes[row] == transactions
        at = first[row[known]]
        return cls(arrived_ms[known], seen.appended_ms[at] - arrived_ms[known], seen.degraded[at])

    def case(self, name: str, started_ms: float, ended_ms: float, ready_s: float) -> Case:
        """The case `name` by the transactions that arrived in its time."""
        within = (self.arrived_ms >= started_ms) & (self.arrived_ms < ended_ms)
        return Case(
            name=name,
            ready_s=round(ready_s, 1),
            transactions=int(within.sum()),
            longest_wait_s=round(float(self.waited_ms[within].max()) / 1e3, 2),
            degraded_share=round(float(self.degraded[within].mean()), 5),
        )


def _is_rolled_out(workload: Object) -> bool:
    wanted, status = workload["spec"]["replicas"], workload["status"]
    counts = {status.get(f"{kind}Replicas", 0) for kind in ("updated", "ready", "available")}
    return (
        status.get("observedGeneration") == workload["metadata"]["generation"]
        and counts | {status.get("replicas", 0)} == {wanted}
        and status.get("updateRevision") == status.get("currentRevision")
    )


def _is_ready(pod: Object) -> bool:
    conditions: list[dict[str, Any]] = pod["status"].get("conditions", [])
    leaving = "deletionTimestamp" in pod["metadata"]
    return not leaving and any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def until(holds: Callable[[], bool], what: str, cluster: Cluster, timeout_s: float = READY_S_MAX) -> None:
    """Waits for a condition of the cluster; a failure shows its state."""
    wait_until(holds, what, timeout_s, cluster.state)
