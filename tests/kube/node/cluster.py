"""The service on a real node, under a steady load; its topics tell what each disturbance cost."""

from __future__ import annotations

import math
import os
import socket
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from bench.cluster import (
    Check,
    Follower,
    LoggedTransactions,
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
from streaming.kafka import FetchedBatch
from streaming.pipeline.decisions import decode_decision
from tests.kube.kubectl import KubectlError, Object
from tests.kube.node.node import Node, http_get
from tests.timing import wait_until

LOCAL = Path(__file__).parents[3] / "k8s" / "overlays" / "local"
NAMESPACE = "cascade"
WORKER, TRITON = "worker", "triton"
# Two cores carry the cluster, the service and the load.
RATE = 120.0
READY_S_MAX, RECOVERY_S_MAX, SETTLE_S_MAX, EXIT_S_MAX = 150.0, 90.0, 120.0, 60.0
HEALTH_PORT = 9464
_LOGS = ("--all-containers", "--tail=12")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A disturbance, under the worker's setting `delivery`.

    `ready_s`: from it until the pods were ready again as wanted, and every partition was decided. The topics tell the
    rest. `repeats`: decisions beyond the first that were appended before the next case. About the transactions of that
    time (`transactions`): the longest time from one to its first decision, both as the broker appended them, and the
    shares of all that were escalated, and that were then degraded.
    """

    name: str
    delivery: str
    ready_s: float
    repeats: int
    transactions: int
    longest_wait_s: float
    escalated_share: float
    degraded_share: float


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """A Triton that was added, in seconds since the command.

    `ready_s`: it said that it is ready. `named_s`: the cluster's DNS named it. `called_s`: the worker called it.
    """

    ready_s: float
    named_s: float
    called_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the topics show at the end. `settled`: all was decided and committed. `deep`: decided by Triton.

    `added`: beside the topics, what an added Triton took.
    """

    settled: bool
    check: Check
    deep: int
    cases: list[Case]
    added: Added
    bundles: list[str]


class Cluster:
    """The overlay `local` on a node, as a context manager; `directory` is for the kustomizations of the tests."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node, self.kubectl = node, node.kubectl
        self._directory = directory
        self._stack = ExitStack()
        self._delivery = ""
        self._windows: list[_Window] = []
        self._added: Added | None = None
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
        self._delivery = tomllib.loads((folder / "cascade.toml").read_text()).get("delivery", self.config.delivery)
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

    def pods(self, *components: str) -> list[Object]:
        """The pods of these parts, by name."""
        selector = f"--selector=app.kubernetes.io/component in ({','.join(components)})"
        found = self.kubectl.items("pods", f"--namespace={NAMESPACE}", selector)
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
        """Waits until worker and Triton have the pods that they should have, ready, and no others."""

        def holds() -> bool:
            names = ("statefulset/cascade-worker", "deployment/triton")
            workloads = self.kubectl.items(*names, f"--namespace={NAMESPACE}")
            return all(map(_is_rolled_out, workloads)) and not any(map(_is_leaving, self.pods(WORKER, TRITON)))

        until(holds, "the rolling update", self)

    def wait_ready(self, component: str, pods: int, timeout_s: float = READY_S_MAX) -> None:
        """Waits until the part has so many pods, none more, and all of them are ready."""

        def holds() -> bool:
            found = self.pods(component)
            return len(found) == pods and all(_is_ready(pod) for pod in found)

        wait_until(holds, f"{pods} ready pods of {component}", timeout_s, self.state)

    @contextmanager
    def expect_exit_codes(self, expected: Mapping[str, int]) -> Iterator[None]:
        """Waits after the body for these exit codes of workers, by pod, which may be gone by then; fails for others."""
        exit_code = "{.status.containerStatuses[0].state.terminated.exitCode}"
        log = self._directory / "exit-codes"
        watch = self.kubectl.start(
            log,
            *("get", "pods", f"--namespace={NAMESPACE}", f"--selector=app.kubernetes.io/component={WORKER}"),
            *("--watch", f"--output=jsonpath={{.metadata.name}} {exit_code}{{'\\n'}}"),
        )

        def found() -> set[tuple[str, ...]]:
            lines = (line.split() for line in log.read_text().splitlines())
            return {tuple(line) for line in lines if len(line) == 2}

        try:
            until(lambda: "\n" in log.read_text(), "the watch of the pods", self)
            yield
            wait_until(lambda: len(found()) >= len(expected), f"ends of {', '.join(expected)}", EXIT_S_MAX, found)
            assert found() == {(name, str(code)) for name, code in expected.items()}
        finally:
            watch.terminate()
            watch.wait()

    def add_triton(self) -> None:
        """Adds a Triton, and waits until the worker calls it."""
        known = {pod["metadata"]["uid"] for pod in self.pods(TRITON)}
        worker = str(self.pods(WORKER)[0]["status"]["podIP"])
        started_s = time.monotonic()
        self.scale("deployment/triton", len(known) + 1)

        def address() -> str:
            new = [pod for pod in self.pods(TRITON) if pod["metadata"]["uid"] not in known]
            return str(new[0]["status"].get("podIP", "")) if new else ""

        until(lambda: address() != "", "the address of the added Triton", self)
        ip = address()
        counter = f'cascade_deep_replica_calls_total{{replica="{ip}:8001"}} '.encode()

        def calls() -> float:
            metrics = http_get(worker, HEALTH_PORT, "/metrics") or b""
            return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(counter))

        steps: dict[str, Callable[[], bool]] = {
            "ready_s": lambda: http_get(ip, 8000, "/v2/health/ready") is not None,
            "named_s": lambda: ip in _addresses("triton"),
            "called_s": lambda: calls() > 0,
        }
        seconds: dict[str, float] = {}
        for step, holds in steps.items():
            until(holds, f"the added Triton: {step}", self)
            seconds[step] = round(time.monotonic() - started_s, 2)
        self._added = msgspec.convert(seconds, Added)

    def state(self) -> str:
        """What a user would look at: pods, events, the end of the logs."""
        shown = []
        for command in (
            ("get", "pods", "--output=wide"),
            ("get", "events", "--sort-by=.lastTimestamp"),
            *(("logs", f"--selector=app.kubernetes.io/component={each}", *_LOGS) for each in (WORKER, TRITON)),
        ):
            try:
                shown.append(self.kubectl("-n", NAMESPACE, *command)[-4_000:])
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
        started_ms = time.time() * 1e3
        yield
        self.wait_until_decided(name)
        self._windows.append(_Window(name, self._delivery, started_ms, time.time() * 1e3))

    def wait_until_decided(self, what: str) -> None:
        """Waits until every partition has decisions about transactions that come from now on."""
        assert self._follower is not None
        watch = self._follower.watch(end_offsets(self.config, self.config.kafka.topics.transactions))
        wait_until(lambda: watch.done, f"{what}: decisions in every partition", RECOVERY_S_MAX, self.state)

    def end(self, path: Path) -> Report:
        """Ends the load, reads the topics from their beginning, and writes the report to `path`."""
        assert self._load is not None
        assert self._added is not None
        sent = self._load.stop()
        settled = wait_until_all_committed(self.config, SETTLE_S_MAX)
        logged, decided = read_transactions(self.config, self._schema), read_decisions(self.config)
        seen = self._read_visible()
        timeline = _Timeline.join(logged, seen)
        report = Report(
            settled=settled,
            check=check(logged, decided, sent),
            deep=int((~decided.screened & ~decided.degraded).sum()),
            cases=list(map(timeline.case, self._windows, [*(each.started_ms for each in self._windows[1:]), math.inf])),
            added=self._added,
            bundles=sorted(set(seen.bundles)),
        )
        write_json(path, report)
        return report

    def _read_visible(self) -> _Visible:
        rows: list[tuple[int, int, int, bool, bool]] = []
        bundles: list[str] = []

        def take(fetched: FetchedBatch) -> None:
            for value, appended_ms in zip(fetched.values, fetched.timestamps_ms, strict=True):
                decision = decode_decision(value or b"", self.config.kafka.codec)
                escalated = decision.degraded or decision.stage != "screener"
                rows.append((*parse_decision_id(decision.decision_id), int(appended_ms), escalated, decision.degraded))
                bundles.append(decision.bundle)

        read_topic(self.config, self.config.kafka.topics.decisions, take)
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        escalated, degraded = columns[3:].astype(bool)
        return _Visible(columns[0], columns[1], columns[2], escalated, degraded, bundles)


class _Window(msgspec.Struct, frozen=True):
    """The time of a case, ms since the epoch."""

    name: str
    delivery: str
    started_ms: float
    ended_ms: float


class _Visible(msgspec.Struct, frozen=True):
    """Decisions as the broker appended them, int64 and bool [decisions]."""

    partition: Int64
    offset: Int64
    appended_ms: Int64
    escalated: Bool
    degraded: Bool
    bundles: list[str]


class _Timeline(msgspec.Struct, frozen=True):
    """Each decided transaction, by its first decision, int64 and bool [transactions]; and when others were repeated."""

    arrived_ms: Int64
    waited_ms: Int64
    escalated: Bool
    degraded: Bool
    repeated_ms: Int64

    @classmethod
    def join(cls, logged: LoggedTransactions, seen: _Visible) -> Self:
        """The transactions, each with the first decision about it."""
        codes, first = np.unique((seen.partition << 44) | seen.offset, return_index=True)
        transactions = (logged.partition << 44) | logged.offset
        row = np.searchsorted(codes, transactions).clip(max=len(codes) - 1)
        known = codes[row] == transactions
        at, arrived_ms = first[row[known]], logged.appended_ms[known]
        repeated_ms = np.delete(seen.appended_ms, first)
        return cls(arrived_ms, seen.appended_ms[at] - arrived_ms, seen.escalated[at], seen.degraded[at], repeated_ms)

    def case(self, window: _Window, next_ms: float) -> Case:
        """The case of this time; the next one starts at `next_ms`."""
        within = (self.arrived_ms >= window.started_ms) & (self.arrived_ms < window.ended_ms)
        repeated = (self.repeated_ms >= window.started_ms) & (self.repeated_ms < next_ms)
        return Case(
            name=window.name,
            delivery=window.delivery,
            ready_s=round((window.ended_ms - window.started_ms) / 1e3, 1),
            repeats=int(repeated.sum()),
            transactions=int(within.sum()),
            longest_wait_s=round(float(self.waited_ms[within].max()) / 1e3, 2),
            escalated_share=round(float(self.escalated[within].mean()), 5),
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
    return not _is_leaving(pod) and any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _is_leaving(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, socket.AF_INET)}
    except socket.gaierror:
        return set()


def until(holds: Callable[[], bool], what: str, cluster: Cluster, timeout_s: float = READY_S_MAX) -> None:
    """Waits for a condition of the cluster; a failure shows its state."""
    wait_until(holds, what, timeout_s, cluster.state)
