"""Renders the Kustomize features that k8s/ uses, where no kubectl is at hand; with one, tests compare the two.

What it does not know it refuses, so that k8s/ cannot come to rely on it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "configMapGenerator", "images", "labels", "namespace",
    "nameSuffix",
}  # fmt: skip
NOT_IN_A_NAMESPACE = {"Namespace"}
# Lists of a pod and what tells their elements apart when one is merged into the other; other lists are replaced.
MERGE_KEYS = {
    "containers": "name", "initContainers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath",
}  # fmt: skip
HEX_TO_LETTERS = str.maketrans("013ae", "ghkmt")


def render(folder: Path) -> list[Document]:
    """What `kubectl kustomize` makes of the folder, in no promised order."""
    return _with_hashes(_accumulate(folder.resolve(), []))


def _accumulate(folder: Path, parents: list[Document]) -> list[Document]:
    """A kustomization adds to nothing, a component to what its parent has gathered so far."""
    text = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(text) <= KNOWN, f"{folder}: {set(text) - KNOWN} is not rendered here"
    documents = parents
    for name in text.get("resources", []):
        path = (folder / name).resolve()
        documents += _accumulate(path, []) if path.is_dir() else load(path)
    for generator in text.get("configMapGenerator", []):
        documents.append(_config_map(folder, generator))
    for name in text.get("components", []):
        documents = _accumulate((folder / name).resolve(), documents)
    for patch in text.get("patches", []):
        documents = _patched(documents, patch, folder)
    for document in documents:
        if "namespace" in text and document["kind"] not in NOT_IN_A_NAMESPACE:
            document["metadata"]["namespace"] = text["namespace"]
        document["metadata"]["name"] += text.get("nameSuffix", "")
        for label in text.get("labels", []):
            assert set(label) <= {"pairs", "includeSelectors"}
            _label(document, label["pairs"], label.get("includeSelectors", False))
        for image in text.get("images", []):
            for container in containers(document):
                _name_image(container, image)
    return documents


def load(path: Path) -> list[Document]:
    # A round trip through JSON undoes YAML's anchors: what shares a node must not change together.
    return [json.loads(json.dumps(one)) for one in yaml.safe_load_all(path.read_text()) if one]


def pod_spec(document: Document) -> Document | None:
    spec: Document | None = document.get("spec", {}).get("template", {}).get("spec")
    return spec


def containers(document: Document) -> Iterator[Document]:
    spec = pod_spec(document) or {}
    yield from spec.get("initContainers", [])
    yield from spec.get("containers", [])


# ---------------------------------------------------------------------------------------------- ConfigMaps


def _config_map(folder: Path, generator: Document) -> Document:
    assert set(generator) <= {"name", "namespace", "files", "envs", "options"}
    data = {Path(name).name: (folder / name).read_text() for name in generator.get("files", [])}
    for name in generator.get("envs", []):
        lines = (line.strip() for line in (folder / name).read_text().splitlines())
        data.update(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    options = generator.get("options", {})
    assert set(options) <= {"disableNameSuffixHash", "labels"}
    meta: Document = {"name": generator["name"], "hashed": not options.get("disableNameSuffixHash", False)}
    if "labels" in options:
        meta["labels"] = dict(options["labels"])
    if "namespace" in generator:
        meta["namespace"] = generator["namespace"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def _with_hashes(documents: list[Document]) -> list[Document]:
    """Each generated ConfigMap gets the hash of its content as a suffix, wherever it is named."""
    named = {}
    for document in documents:
        if document["metadata"].pop("hashed", False):
            name = document["metadata"]["name"]
            named[name] = document["metadata"]["name"] = f"{name}-{config_map_hash(document['data'])}"
    for document in documents:
        sources = [source for c in containers(document) for source in c.get("envFrom", [])]
        references = [source["configMapRef"] for source in sources if "configMapRef" in source]
        volumes = (pod_spec(document) or {}).get("volumes", [])
        references += [volume["configMap"] for volume in volumes if "configMap" in volume]
        for reference in references:
            reference["name"] = named.get(reference["name"], reference["name"])
    return documents


def config_map_hash(data: dict[str, str]) -> str:
    # Kustomize looks for the name where there is none, so it counts as empty.
    whole = {"data": data, "kind": "ConfigMap", "name": ""}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # As Go writes JSON: these three are escaped.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(HEX_TO_LETTERS)


# ------------------------------------------------------------------------------------------------- patches


def _patched(documents: list[Document], patch: Document, folder: Path) -> list[Document]:
    assert set(patch) <= {"target", "patch", "path"}
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
    change = yaml.safe_load(text)
    if isinstance(change, dict):
        target = patch.get("target", {"kind": change["kind"], "name": change["metadata"]["name"]})
    else:
        target = patch["target"]
    chosen = [document for document in documents if _is_target(document, target)]
    # A target that is not there is left alone, as a component's may be; a patch that names its own must find it.
    assert chosen or "target" in patch, f"{folder}: nothing is patched by {target}"
    if isinstance(change, dict) and change.get("$patch") == "delete":
        return [document for document in documents if document not in chosen]
    for document in chosen:
        if isinstance(change, dict):
            merge(document, {key: value for key, value in change.items() if key != "metadata"})
        else:
            for operation in change:
                _operate(document, copy.deepcopy(operation))
    return documents


def _is_target(document: Document, target: Document) -> bool:
    assert set(target) <= {"kind", "name", "labelSelector"}
    label, _, value = target.get("labelSelector", "").partition("=")
    return (
        document["kind"] == target.get("kind", document["kind"])
        and document["metadata"]["name"] == target.get("name", document["metadata"]["name"])
        and (not label or document["metadata"].get("labels", {}).get(label) == value)
    )


def merge(into: Document, change: Document) -> None:
    """A strategic merge: null deletes, lists with a merge key are merged by it, others replaced."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        elif isinstance(value, list) and key in MERGE_KEYS:
            into[key] = _merged_list(into.get(key, []), value, MERGE_KEYS[key])
        else:
            into[key] = copy.deepcopy(value)


def _merged_list(old: list[Document], change: list[Document], by: str) -> list[Document]:
    changes = {one[by]: one for one in change}
    gone = {name for name, one in changes.items() if one.get("$patch") == "delete"}
    known = {one[by] for one in old}
    for one in old:
        merge(one, changes.get(one[by], {}) if one[by] not in gone else {})
    # What is new goes in front, as Kustomize has it.
    new = [copy.deepcopy(one) for name, one in changes.items() if name not in known | gone]
    return new + [one for one in old if one[by] not in gone]


def _operate(document: Any, operation: Document) -> None:
    """One step of a JSON patch (RFC 6902): `add` alone."""
    assert operation["op"] == "add", f"{operation['op']} is not rendered here"
    *path, last = operation["path"].removeprefix("/").split("/")
    for step in path:
        document = document[int(step)] if isinstance(document, list) else document[step]
    if isinstance(document, list):
        document.insert(len(document) if last == "-" else int(last), operation["value"])
    else:
        document[last] = operation["value"]


# ------------------------------------------------------------------------------------------ labels, images


def _label(document: Document, pairs: dict[str, str], selectors: bool) -> None:
    document["metadata"].setdefault("labels", {}).update(pairs)
    if not selectors:
        return
    kind, spec = document["kind"], document["spec"]
    assert kind in ("StatefulSet", "PodDisruptionBudget"), f"selectors of {kind} are not rendered here"
    spec["selector"]["matchLabels"].update(pairs)
    if kind == "StatefulSet":
        template = spec["template"]
        template["metadata"]["labels"].update(pairs)
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            constraint["labelSelector"]["matchLabels"].update(pairs)
        for claim in spec.get("volumeClaimTemplates", []):
            claim["metadata"].setdefault("labels", {}).update(pairs)


def _name_image(container: Document, image: Document) -> None:
    assert set(image) <= {"name", "newName", "newTag"}
    name, _, tag = container["image"].partition(":")
    if name == image["name"]:
        tag = image.get("newTag", tag)
        container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")
