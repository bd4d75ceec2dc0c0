"""The service takes each overlay's cascade.toml, and it agrees with the objects around it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cascade.config import Config, load_config
from streaming.service.topics import topic_specs
from tests.k8s.manifests import (
    OVERLAYS,
    Object,
    Objects,
    configuration,
    find,
    of_kind,
    pods,
    port_names,
    render,
    render_with,
    selects,
    settings,
)

# The settings in which an overlay differs from the base: its file is written whole, so it could miss a change there.
DIFFERENCES = {
    "local": {"kafka.bootstrap"},
    "exactly-once": {"delivery"},
    "object-store": {"state.snapshots"},
    "tls": {
        "kafka.bootstrap",
        *(f"kafka.security.{key}" for key in ("protocol", "ca_file", "username", "password_file")),
        *(f"deep.{key}" for key in ("tls", "ca_file", "certificate_file", "key_file")),
    },
}
CANARY = {"kafka.group", "kafka.topics.decisions", "kafka.topics.dead_letters", "kafka.topics.summaries", "deep.url"}
# overlay, StatefulSet
WORKERS = [*((overlay, "cascade-worker") for overlay in OVERLAYS), ("canary", "cascade-worker-canary")]
# Files that the configuration names and a Secret provides.
SECRET_FILE = re.compile(r'"(/etc/cascade-[^"]*)"')


def load(text: str, directory: Path) -> Config:
    """Loads a configuration, with the files of Secrets below `directory`."""
    for file in SECRET_FILE.findall(text):
        place = directory / file.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("secret\n")
    path = directory / "cascade.toml"
    path.write_text(text.replace('"/etc/cascade-', f'"{directory}/etc/cascade-'))
    return load_config(path, {"POD_NAME": "cascade-worker-0"})


def pod(objects: Objects, name: str) -> Object:
    spec: Object = find(objects, "StatefulSet", name)["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(("overlay", "worker"), WORKERS)
def test_the_service_takes_the_configuration(overlay: str, worker: str, tmp_path: Path) -> None:
    config = load(configuration(render(overlay), worker), tmp_path)
    assert config.kafka.instance == "cascade-worker-0"


@pytest.mark.parametrize(("overlay", "worker"), WORKERS)
def test_a_configuration_differs_from_the_base_only_where_it_must(overlay: str, worker: str) -> None:
    base = settings(configuration(render("a100-7x1g"), "cascade-worker"))
    own = settings(configuration(render(overlay), worker))
    expected = CANARY if worker == "cascade-worker-canary" else DIFFERENCES.get(overlay, set())
    assert {name for name in base.keys() | own.keys() if base.get(name) != own.get(name)} == expected


@pytest.mark.parametrize(("overlay", "worker"), WORKERS)
def test_the_pods_have_what_the_configuration_names(overlay: str, worker: str, tmp_path: Path) -> None:
    objects = render(overlay)
    text, spec = configuration(objects, worker), pod(objects, worker)
    config, (container,) = load(text, tmp_path), spec["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert config.health.host == "0.0.0.0"  # noqa: S104
    assert port_names(spec) == {"health": config.health.port}
    assert mounts[config.bundle.path]
    assert mounts.get(config.state.snapshots, False) is False
    assert config.state.snapshots in mounts or config.state.snapshots.startswith("s3://")
    assert settings(text)["kafka.instance_env"] in {variable["name"] for variable in container["env"]}
    assert all(mounts[str(Path(file).parent)] for file in SECRET_FILE.findall(text))
    assert config.terminals.share


@pytest.mark.parametrize(("overlay", "worker"), WORKERS)
def test_a_worker_may_reach_kafka_and_triton(overlay: str, worker: str, tmp_path: Path) -> None:
    objects = render(overlay)
    config = load(configuration(objects, worker), tmp_path)
    labels = find(objects, "StatefulSet", worker)["spec"]["template"]["metadata"]["labels"]
    policies = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    own = [policy for policy in policies if selects(policy["podSelector"], labels)]
    allowed = {port["port"] for policy in own for rule in policy.get("egress", []) for port in rule["ports"]}
    host, _, port = config.deep.url.partition(":")
    service = find(objects, "Service", host)["spec"]
    assert service["clusterIP"] == "None"
    assert int(port) in {entry["port"] for entry in service["ports"]} & allowed
    assert {int(server.rpartition(":")[2]) for server in config.kafka.servers} <= allowed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_that_connect_by_name_may_ask_the_clusters_dns(overlay: str) -> None:
    objects = render(overlay)
    policies = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    for name, labels, _ in pods(objects):
        own = [policy for policy in policies if selects(policy["podSelector"], labels)]
        allowed = {
            (port["protocol"], port["port"])
            for policy in own
            for rule in policy.get("egress", [])
            for port in rule["ports"]
        }
        # Triton only answers, unless it fetches its bundle
        silent = labels["app.kubernetes.io/component"] == "triton" and "cascade/object-store-client" not in labels
        assert ({("UDP", 53), ("TCP", 53)} <= allowed) is not silent, name


def test_a_canary_shares_only_what_it_reads(tmp_path: Path) -> None:
    objects = render("canary")
    stable, canary = (load(configuration(objects, name), tmp_path) for _, name in WORKERS if _ == "canary")
    assert stable.kafka.group != canary.kafka.group
    names = [{spec.name for spec in topic_specs(config, 1)} for config in (stable, canary)]
    assert names[0] & names[1] == {"transactions", "labels"}
    # a call of the canary must not reach the stable bundle's model, nor the other way round
    for track, name in (("stable", stable.deep.url), ("canary", canary.deep.url)):
        selector = find(objects, "Service", name.partition(":")[0])["spec"]["selector"]
        assert selector["cascade/track"] == track
    images = [pod(objects, name)["initContainers"][0]["image"] for name in ("cascade-worker", "cascade-worker-canary")]
    assert images[0] != images[1]


def test_strimzi_makes_the_topics_that_the_service_would_make(tmp_path: Path) -> None:
    job = find(render("a100-7x1g"), "Job", "cascade-topics")["spec"]["template"]["spec"]["containers"][0]
    arguments = dict(zip(job["args"][1::2], job["args"][2::2], strict=True))
    config = load(configuration(render("a100-7x1g"), "cascade-worker"), tmp_path)
    objects = render_with("a100-7x1g", ["strimzi"], tmp_path)
    assert not of_kind(objects, "Job")
    topics = {
        item["metadata"]["name"]: (
            item["spec"]["partitions"],
            item["spec"]["replicas"],
            {name: str(content) for name, content in item["spec"]["config"].items()},
        )
        for item in of_kind(objects, "KafkaTopic")
    }
    assert topics == {
        spec.name: (spec.partitions, int(arguments["--replication"]), dict(spec.settings or {}))
        for spec in topic_specs(config, int(arguments["--partitions"]))
    }
