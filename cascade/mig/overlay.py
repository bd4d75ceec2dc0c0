"""Writes a MIG layout as a Kustomize overlay: a Triton Deployment for each profile, beside the base."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Final

from cascade.mig.gpus import Gpu

_OVERLAY: Final = Template("""\
# Triton on MIG slices of $gpu, written by cascade.mig.overlay.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: cascade
resources:
  - $base
$profiles""")

# A limit of an extended resource is its request too; both are written, so that a reader need not know.
_PROFILE: Final = Template("""\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
nameSuffix: -$name
resources:
  - $triton
labels:
  - pairs: {cascade/mig-profile: $profile}
    includeSelectors: true
replicas:
  - {name: triton, count: $count}
patches:
  - target: {kind: Deployment, name: triton}
    patch: |-
      - op: add
        path: /spec/template/spec/containers/0/resources/requests/nvidia.com~1mig-$profile
        value: 1
      - op: add
        path: /spec/template/spec/containers/0/resources/limits/nvidia.com~1mig-$profile
        value: 1
""")


def write_overlay(directory: Path, replicas: Mapping[str, int], gpu: Gpu, base: str = "../../base") -> None:
    """Writes the overlay of a layout to `directory`, which may exist.

    - `replicas`: Triton pods by profile name, `{"1g.5gb": 7}`; each pod gets one slice.
    - `gpu`: the GPU that has these profiles.
    - `base`: path of `k8s/base` relative to `directory`, with `/`. `triton` is beside it.

    Raises DataError for a profile that the GPU does not have, ValueError for a count below 1, OSError if a file cannot
    be written.
    """
    for profile, count in replicas.items():
        gpu.profile(profile)
        if count < 1:
            raise ValueError(f"{profile}: {count} pods: use 1 or more, or leave the profile out")
    names = {profile: profile.replace(".", "-") for profile in replicas}
    directory.mkdir(parents=True, exist_ok=True)
    profiles = "".join(f"  - triton-{name}\n" for name in names.values())
    _write(directory, _OVERLAY.substitute(gpu=gpu.key, base=base, profiles=profiles))
    triton = posixpath.normpath(f"../{base}/../triton")
    for profile, count in replicas.items():
        name = names[profile]
        text = _PROFILE.substitute(name=name, profile=profile, count=count, triton=triton)
        _write(directory / f"triton-{name}", text)


def _write(directory: Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "kustomization.yaml").write_text(text)
