"""The real kubectl, called as a user would call it; JSON in, JSON out."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CALL_S_MAX = 90.0

# an object of Kubernetes, as its API's JSON
Object = dict[str, Any]


class KubectlError(Exception):
    """kubectl failed; the text is what it wrote to standard error."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one cluster. `program`: its path. `kubeconfig`: the cluster and the user. `cache`: a directory."""

    program: Path
    kubeconfig: Path
    cache: Path

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        """Standard output of `kubectl arguments...`. Raises KubectlError."""
        return self.run(*arguments, stdin=stdin).stdout

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """`kubectl arguments...`, with what it wrote to standard error. Raises KubectlError."""
        done = subprocess.run(
            self.command(*arguments),
            input=stdin,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=CALL_S_MAX,
            check=False,
        )
        if done.returncode != 0:
            raise KubectlError(done.stderr.strip() or done.stdout.strip())
        return done

    def start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """`kubectl arguments...` in the background, with its output in the file `log`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(*arguments), env=self.environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def command(self, *arguments: str) -> list[str]:
        """Program and arguments."""
        return [str(self.program), *arguments]

    def environment(self) -> dict[str, str]:
        """The environment that `command` needs."""
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(self.cache)}

    def get(self, *arguments: str) -> Object:
        """The object, or the list object, that `kubectl get arguments...` returns."""
        found: Object = json.loads(self("get", *arguments, "--output=json"))
        return found

    def items(self, *arguments: str) -> list[Object]:
        """The objects of the list that `kubectl get arguments...` returns."""
        found: list[Object] = self.get(*arguments)["items"]
        return found

    def apply(self, objects: Sequence[Object], *options: str) -> str:
        """Applies objects on the server's side; returns the server's warnings. Raises KubectlError if it refuses."""
        return self.run("apply", "--server-side", *options, "--filename=-", stdin=as_list(objects)).stderr

    def create(self, objects: Sequence[Object]) -> None:
        """Creates objects, with their status. Raises KubectlError where the server refuses one."""
        self("create", "--filename=-", stdin=as_list(objects))

    def render(self, folder: Path) -> list[Object]:
        """The objects of the kustomization in `folder`."""
        return [document for document in yaml.safe_load_all(self("kustomize", str(folder))) if document]


def as_list(objects: Sequence[Object]) -> str:
    """Objects as one document for kubectl's standard input."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
