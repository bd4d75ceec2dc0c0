"""Checks an object against the schemas of Kubernetes and of the custom resources; an unknown field is an error too."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from cascade.errors import LocalPartError
from tests.k8s.manifests import Object, parse
from tests.kube.build import built

# The three newest minor versions that the package knows.
VERSIONS = [".".join(version.split(".")[:2]) for version in all_versions()[-3:]]
# Of the custom resources that k8s/ uses.
DEFINITIONS = (
    "kafka.strimzi.io_kafkatopics",
    "keda.sh_scaledobjects",
    "keda.sh_triggerauthentications",
    "monitoring.coreos.com_podmonitors",
    "monitoring.coreos.com_prometheusrules",
)
GROUPS = {name.partition("_")[0] for name in DEFINITIONS}


def is_custom(item: Object) -> bool:
    """Whether the object is of a custom resource."""
    return str(item["apiVersion"]).partition("/")[0] in GROUPS


def problem(item: Object) -> str | None:
    """What an API server would refuse in the object, or None; skips the test where the definitions are not built."""
    text = json.dumps(item, sort_keys=True)
    return _custom_problem(text) if is_custom(item) else _problem(text)


@cache
def _problem(text: str) -> str | None:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(json.loads(text), version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            return f"Kubernetes {version}: {error}"
    return None


@cache
def _custom_problem(text: str) -> str | None:
    item = json.loads(text)
    schema = _definitions().get((item["apiVersion"], item["kind"]))
    if schema is None:
        return f"no custom resource {item['apiVersion']} {item['kind']}"
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(item))
    return None if error is None else f"{error.json_path}: {error.message}"


@cache
def _definitions() -> dict[tuple[str, str], Object]:
    try:
        folder = built("crds")
    except LocalPartError as error:
        pytest.skip(str(error))
    found = {}
    for name in DEFINITIONS:
        (definition,) = parse((folder / f"{name}.yaml").read_text())
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = _closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _closed(schema: Any) -> Any:
    """A schema of a custom resource in which an object has no fields but those that it names."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed.setdefault("additionalProperties", False)
    return closed
