"""The manifests of k8s/ as they are applied, and small words to ask about them; for the test_k8s files."""

from __future__ import annotations

import functools
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from kustomize import Document, containers, pod_spec, render

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"

# Everything that can be applied: a folder, and components that a user's own overlay may add to it.
CONFIGURATIONS = {
    "single": ("overlays/single", ()),
    "gpu": ("overlays/gpu", ()),
    "sharded": ("overlays/sharded", ()),
    "build": ("jobs/build", ()),
    "publish": ("jobs/publish", ()),
    "single-secured": ("overlays/single", ("observability", "keys", "tls")),
    "single-volume": ("overlays/single", ("volume", "keys")),
    "gpu-volume": ("overlays/gpu", ("volume", "tls")),
    "sharded-secured": ("overlays/sharded", ("observability", "keys", "tls", "shard-tls")),
}
JOBS = ("build", "publish")
CUSTOM = {"ServiceMonitor", "PrometheusRule"}


def write_overlay(name: str, folder: Path) -> Path:
    """The folder to apply: ours, or one written into `folder` as a user writes an overlay with components."""
    base, components = CONFIGURATIONS[name]
    if not components:
        return K8S / base
    folder = folder.resolve()
    relative = [os.path.relpath(K8S / "components" / one, folder) for one in components]
    text = {"kind": "Kustomization", "resources": [os.path.relpath(K8S / base, folder)], "components": relative}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return folder


@functools.cache
def rendered() -> dict[str, list[Document]]:
    found = {}
    for name in CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = render(write_overlay(name, Path(folder)))
    return found


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def workloads(documents: list[Document]) -> list[Document]:
    return [document for document in documents if pod_spec(document) is not None]


def spec_of(workload: Document) -> Document:
    spec = pod_spec(workload)
    assert spec is not None
    return spec


def labels(workload: Document) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def selected(documents: list[Document], selector: dict[str, str]) -> list[Document]:
    return [one for one in workloads(documents) if selector.items() <= labels(one).items()]


def ports(workload: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in containers(workload) for port in c.get("ports", [])}


def named(documents: list[Document], kind: str, name: str) -> Document:
    return next(one for one in of_kind(documents, kind) if one["metadata"]["name"] == name)


def serving(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    for one in of_kind(documents, "Deployment", "StatefulSet"):
        yield one, spec_of(one)["containers"][0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def flag(container: Document, name: str) -> str | None:
    words = container["args"]
    return words[words.index(name) + 1] if name in words else None


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from vecsvc.cli import main; main()", *words]
