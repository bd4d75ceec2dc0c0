"""What the tests read from pods."""

from __future__ import annotations

from collections.abc import Sequence

from tests.kube.kubectl import Kubectl, Object
from tests.timing import wait_until

READY_S_MAX = 60.0


def is_ready(pod: Object) -> bool:
    """Whether the pod runs, counts as ready, and is not about to end."""
    status = pod.get("status", {})
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", []))
    # a completed pod of KWOK's still counts as ready
    return ready and status["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]


def ready(pods: Sequence[Object]) -> list[Object]:
    """Those that are ready."""
    return [pod for pod in pods if is_ready(pod)]


def refusals(pods: Sequence[Object]) -> dict[str, str]:
    """The scheduler's message, by the name of each pod that it could not place."""
    return {
        pod["metadata"]["name"]: condition["message"]
        for pod in pods
        for condition in pod.get("status", {}).get("conditions", [])
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    }


def of_component(kubectl: Kubectl, namespace: str, component: str) -> list[Object]:
    """The pods of a component of Cascade: `worker`, `triton`, `topics`."""
    return kubectl.items("pods", f"--namespace={namespace}", f"--selector=app.kubernetes.io/component={component}")


def wait_ready(kubectl: Kubectl, namespace: str, counts: dict[str, int]) -> None:
    """Waits until each component, by name, has exactly so many pods, all of them ready."""

    def found() -> dict[str, tuple[int, int]]:
        by_component = {name: of_component(kubectl, namespace, name) for name in counts}
        return {name: (len(ready(pods)), len(pods)) for name, pods in by_component.items()}

    wanted = {name: (count, count) for name, count in counts.items()}
    wait_until(lambda: found() == wanted, f"{wanted} (ready, all) in {namespace}", READY_S_MAX, found)
