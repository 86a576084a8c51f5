"""What the schemas of Kubernetes cannot know of k8s/: that names meet, and that vecsvc is as the manifests think."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from corpora import make_vectors
from kubernetes_validate.utils import all_versions
from kustomize import Document, containers, load, pod_spec, render

import vecsvc
from vecsvc.cli import cli
from vecsvc.config import ServeSettings, read_settings
from vecsvc.topology import read_topology

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import running  # noqa: E402

# What the manifests name and vecsvc does not have yet. A name that has come to exist must leave this list.
PENDING: dict[str, set[str]] = {
    "commands": {"publish", "push", "pull"},
    "flags": {"build-index --shard"},
    "metrics": set(),
}

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
NEWEST = list(dict.fromkeys(version.rpartition(".")[0] for version in all_versions()))[-3:]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each configuration as a folder with a kustomization, written as a user would write an overlay."""
    found = {}
    for name, (base, components) in CONFIGURATIONS.items():
        found[name] = K8S / base
        if components:
            folder = found[name] = tmp_path_factory.mktemp(name).resolve()
            relative = [os.path.relpath(K8S / "components" / one, folder) for one in components]
            text = {"kind": "Kustomization", "resources": [os.path.relpath(K8S / base, folder)], "components": relative}
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return found


@pytest.fixture(scope="session")
def rendered(folders: dict[str, Path]) -> dict[str, list[Document]]:
    return {name: render(folder) for name, folder in folders.items()}


@pytest.fixture(params=CONFIGURATIONS)
def documents(request: pytest.FixtureRequest, rendered: dict[str, list[Document]]) -> list[Document]:
    return rendered[request.param]


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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def flag(container: Document, name: str) -> str | None:
    words = container["args"]
    return words[words.index(name) + 1] if name in words else None


# ------------------------------------------------------------------------------------------ schemas, rendering


@pytest.mark.parametrize("version", NEWEST)
def test_every_manifest_is_valid_strictly(version: str, rendered: dict[str, list[Document]]) -> None:
    different = {json.dumps(one, sort_keys=True) for documents in rendered.values() for one in documents}
    different |= {json.dumps(one, sort_keys=True) for one in load(K8S / "components" / "example-secrets.yaml")}
    checked = 0
    for text in sorted(different):
        document = json.loads(text)
        if document["kind"] not in CUSTOM:
            assert kubernetes_validate.validate(document, version, strict=True) == version
            checked += 1
    assert checked > 40


def test_the_validator_would_notice_a_misspelt_key(rendered: dict[str, list[Document]]) -> None:
    document = json.loads(json.dumps(named(rendered["single"], "Deployment", "vecsvc")))
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, NEWEST[-1], strict=True)


def test_only_the_component_for_it_has_custom_resources(rendered: dict[str, list[Document]]) -> None:
    for name, documents in rendered.items():
        assert bool(of_kind(documents, *CUSTOM)) == ("observability" in CONFIGURATIONS[name][1])
        assert all(one["apiVersion"].startswith("monitoring.coreos.com/") for one in of_kind(documents, *CUSTOM))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_kubectl_renders_the_same(name: str, folders: dict[str, Path], rendered: dict[str, list[Document]]) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(folders[name])], capture_output=True, text=True, check=True)

    def keyed(documents: list[Document]) -> dict[tuple[str, str], Document]:
        return {(one["kind"], one["metadata"]["name"]): one for one in documents}

    theirs = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert len(theirs) == len(rendered[name])
    assert keyed(theirs) == keyed(rendered[name])


def test_names_are_unique_and_in_one_namespace(documents: list[Document]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in documents]
    assert len(set(names)) == len(names)
    assert {one["metadata"].get("namespace") for one in documents if one["kind"] != "Namespace"} == {"vecsvc"}


# ------------------------------------------------------------------------------------------- names that meet


def test_workloads_and_services_select_the_pods_that_they_mean(documents: list[Document]) -> None:
    for one in of_kind(documents, "Deployment", "StatefulSet"):
        assert selected(documents, one["spec"]["selector"]["matchLabels"]) == [one]
    for one in of_kind(documents, "Service"):
        chosen = selected(documents, one["spec"]["selector"])
        assert chosen, one["metadata"]["name"]
        for port in one["spec"]["ports"]:
            assert all(port["targetPort"] in ports(pod) for pod in chosen)
            headless = one["spec"].get("clusterIP") == "None"
            # Behind a headless name callers reach the container's port itself.
            assert not headless or all(ports(pod)[port["targetPort"]] == port["port"] for pod in chosen)
    for one in of_kind(documents, "StatefulSet"):
        assert named(documents, "Service", one["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


def test_service_monitors_find_services_that_publish_their_port(documents: list[Document]) -> None:
    for monitor in of_kind(documents, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        services = [
            one for one in of_kind(documents, "Service") if wanted.items() <= one["metadata"].get("labels", {}).items()
        ]
        assert len(services) == 1
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {
            port["name"] for port in services[0]["spec"]["ports"]
        }
        scraped = [one for one in workloads(documents) if "admin" in ports(one)]
        assert selected(documents, services[0]["spec"]["selector"]) == scraped
        for endpoint in monitor["spec"]["endpoints"]:
            for one in scraped:
                container = spec_of(one)["containers"][0]
                assert ("authorization" in endpoint) == (flag(container, "--keys") is not None)
                assert (endpoint.get("scheme") == "https") == (flag(container, "--tls-cert") is not None)


def replicas(documents: list[Document], workload: Document) -> int:
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        if scaler["spec"]["scaleTargetRef"]["name"] == workload["metadata"]["name"]:
            return int(scaler["spec"]["minReplicas"])
    return int(workload["spec"].get("replicas", 1))


def test_a_disruption_budget_covers_every_workload_once_and_never_one_replica(documents: list[Document]) -> None:
    budgets = of_kind(documents, "PodDisruptionBudget")
    covered = [pod for one in budgets for pod in selected(documents, one["spec"]["selector"]["matchLabels"])]
    lasting = of_kind(documents, "Deployment", "StatefulSet")
    assert len(covered) == len(lasting) == len(budgets)
    assert all(one in covered for one in lasting)
    for one in lasting:
        assert replicas(documents, one) >= 2
    assert all(one["spec"]["maxUnavailable"] == 1 for one in budgets)


def test_autoscalers_have_a_target_that_sets_no_replicas_itself(rendered: dict[str, list[Document]]) -> None:
    for documents in rendered.values():
        for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
            target = scaler["spec"]["scaleTargetRef"]
            found = named(documents, target["kind"], target["name"])
            assert found["apiVersion"] == target["apiVersion"] and "replicas" not in found["spec"]
            # A share of what is requested is a share of nothing where nothing is.
            assert all("cpu" in container["resources"]["requests"] for container in containers(found))
    assert of_kind(rendered["sharded"], "HorizontalPodAutoscaler")


def test_pods_are_spread_over_hosts_and_zones_among_their_like(documents: list[Document]) -> None:
    for one in of_kind(documents, "Deployment", "StatefulSet"):
        constraints = spec_of(one)["topologySpreadConstraints"]
        assert {c["topologyKey"] for c in constraints} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        for constraint in constraints:
            assert constraint["labelSelector"]["matchLabels"] == one["spec"]["selector"]["matchLabels"]


def test_mounts_have_volumes_and_volumes_have_sources(documents: list[Document]) -> None:
    secrets = {one["metadata"]["name"] for one in load(K8S / "components" / "example-secrets.yaml")}
    for one in workloads(documents):
        spec = spec_of(one)
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        claimed = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for container in containers(one) for mount in container.get("volumeMounts", [])}
        assert mounted == volumes.keys() | claimed
        for volume in volumes.values():
            if "configMap" in volume:
                assert named(documents, "ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
        for container in containers(one):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(set(paths)) == len(paths)


def mounted_keys(documents: list[Document], workload: Document, container: Document) -> Iterator[tuple[str, set[str]]]:
    """Where a ConfigMap or Secret is mounted, and the names of the files there."""
    secrets = {one["metadata"]["name"]: one for one in load(K8S / "components" / "example-secrets.yaml")}
    volumes = {volume["name"]: volume for volume in spec_of(workload)["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes.get(mount["name"], {})
        if "configMap" in volume:
            yield mount["mountPath"], set(named(documents, "ConfigMap", volume["configMap"]["name"])["data"])
        if "secret" in volume:
            yield mount["mountPath"], set(secrets[volume["secret"]["secretName"]]["stringData"])


def test_files_that_containers_are_pointed_to_are_mounted(documents: list[Document]) -> None:
    for one in workloads(documents):
        for container in containers(one):
            files = {f"{path}/{key}" for path, keys in mounted_keys(documents, one, container) for key in keys}
            writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
            words = [*container["args"], *(variable.get("value", "") for variable in container.get("env", []))]
            for word in words:
                if word.startswith("/etc/"):
                    assert word in files
                if word.startswith(("/data", "/tmp")):
                    everywhere = [mount["mountPath"] for mount in container["volumeMounts"]]
                    assert any(Path(word).is_relative_to(path) for path in everywhere)
            # tempfile and the kernels' folder need a place, where the root file system takes nothing.
            assert "/tmp" in writable


def test_words_in_brackets_are_variables_of_the_container(documents: list[Document]) -> None:
    for one in workloads(documents):
        for container in containers(one):
            known = {variable["name"] for variable in container.get("env", [])}
            for source in container.get("envFrom", []):
                known |= set(named(documents, "ConfigMap", source["configMapRef"]["name"])["data"])
            used = {name for word in container["args"] for name in re.findall(r"\$\(([A-Z_]+)\)", word)}
            assert used <= known
            for variable in container.get("env", []):
                path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
                if path.startswith("metadata.labels["):
                    assert path.removeprefix("metadata.labels['").removesuffix("']") in labels(one)
                reference = variable.get("valueFrom", {}).get("resourceFieldRef")
                if reference:
                    assert reference["containerName"] == container["name"]
                    kind, _, resource = reference["resource"].partition(".")
                    assert resource in container["resources"][kind]


# ------------------------------------------------------------------------------------------------ the network


def test_network_policies_select_pods_that_exist_and_ports_that_they_have(documents: list[Document]) -> None:
    for policy in of_kind(documents, "NetworkPolicy"):
        spec = policy["spec"]
        pods = selected(documents, spec["podSelector"].get("matchLabels", {}))
        assert pods, policy["metadata"]["name"]
        for rule in spec.get("ingress", []):
            for port in rule["ports"]:
                assert any(port["port"] in ports(pod) for pod in pods)
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in rule.get("from", rule.get("to", [])):
                if "podSelector" in peer:
                    others = selected(documents, peer["podSelector"]["matchLabels"])
                    assert others
                    if rule in spec.get("egress", []):
                        assert all(port["port"] in ports(pod) for port in rule["ports"] for pod in others)


def who_may_reach(documents: list[Document], pod: Document, port: str) -> list[Any]:
    """The peers that policies let in to a port; None among them for anybody."""
    found: list[Any] = []
    for policy in of_kind(documents, "NetworkPolicy"):
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels(pod).items():
            for rule in policy["spec"].get("ingress", []):
                if port in [one["port"] for one in rule["ports"]]:
                    found += rule.get("from", [None])
    return found


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in JOBS])
def test_each_port_is_open_to_those_it_is_for_and_nobody_else(name: str, rendered: dict[str, list[Document]]) -> None:
    documents = rendered[name]
    nothing = named(documents, "NetworkPolicy", "vecsvc-nothing")["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    front_doors = {"app.kubernetes.io/name": "vecsvc", "app.kubernetes.io/component": "api"}
    expected = {"http": [None], "admin": [monitoring], "shard": [{"podSelector": {"matchLabels": front_doors}}]}
    for pod in workloads(documents):
        for port in ports(pod):
            assert who_may_reach(documents, pod, port) == expected[port]


# ------------------------------------------------------------------------------------------------ the pods


def test_no_pod_can_do_more_than_it_needs(documents: list[Document]) -> None:
    account = [one["metadata"]["name"] for one in of_kind(documents, "ServiceAccount")]
    for one in workloads(documents):
        spec = spec_of(one)
        assert spec["enableServiceLinks"] is False
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "vecsvc" and account in ([], ["vecsvc"])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] == pod["runAsGroup"] == 65532
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(one):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]


def test_memory_is_promised_and_bounded_and_processors_are_promised(documents: list[Document]) -> None:
    for one in workloads(documents):
        for container in containers(one):
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            assert "cpu" in resources["requests"] and "cpu" not in resources["limits"]
        for volume in spec_of(one).get("volumes", []):
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": 1})


def serving(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    for one in of_kind(documents, "Deployment", "StatefulSet"):
        yield one, spec_of(one)["containers"][0]


def test_loading_is_startup_and_a_version_that_does_not_open_takes_no_pod_away(documents: list[Document]) -> None:
    for _, container in serving(documents):
        asks = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
        assert {probe["httpGet"]["port"] for probe in asks.values()} == {"admin"}
        speaks = "HTTPS" if flag(container, "--tls-cert") else "HTTP"
        assert {probe["httpGet"].get("scheme", "HTTP") for probe in asks.values()} == {speaks}
        assert asks["startup"]["httpGet"]["path"] == "/readyz"
        assert asks["startup"]["periodSeconds"] * asks["startup"]["failureThreshold"] >= 1200
        assert asks["readiness"]["httpGet"]["path"] == asks["liveness"]["httpGet"]["path"] == "/livez"
        patience = {name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in asks.items()}
        assert patience["readiness"] <= 10 and patience["liveness"] >= 60


def test_a_pod_has_time_to_end_what_it_began(documents: list[Document]) -> None:
    for one, container in serving(documents):
        sleeps = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain_s = float(flag(container, "--drain-s") or 0)
        assert sleeps + drain_s >= 5, "requests still come for a while to a pod that is told to end"
        shutdown_s = ServeSettings().shutdown_s
        for path, keys in mounted_keys([*documents], one, container):
            if path == "/etc/vecsvc/settings":
                assert keys == {"vecsvc.toml"}
                shutdown_s = settings_of(documents, one).shutdown_s
        assert spec_of(one)["terminationGracePeriodSeconds"] >= sleeps + drain_s + shutdown_s + 5
        assert one["spec"]["minReadySeconds"] >= 5
        if one["kind"] == "Deployment":
            startup = container["startupProbe"]
            assert one["spec"]["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def settings_of(documents: list[Document], workload: Document) -> ServeSettings:
    volumes = {volume["name"]: volume for volume in spec_of(workload)["volumes"]}
    data = named(documents, "ConfigMap", volumes["settings"]["configMap"]["name"])["data"]
    return ServeSettings(**tomllib.loads(data["vecsvc.toml"])["serve"])


def test_a_sidecar_that_pulls_lives_beside_what_serves_and_alone_may_write(documents: list[Document]) -> None:
    for one, container in serving(documents):
        index = {mount["name"]: mount for mount in container["volumeMounts"]}.get("indexes")
        assert (index is None) == (container["args"][0] == "route")
        if index is not None:
            assert index["readOnly"] is True and index["mountPath"] == container["args"][1]
        for sidecar in spec_of(one).get("initContainers", []):
            assert sidecar["restartPolicy"] == "Always" and flag(sidecar, "--watch")
            assert sidecar["args"][2] == container["args"][1]
            assert flag(sidecar, "--shards") == flag(container, "--shards")


def test_every_image_is_the_one_of_the_overlay(rendered: dict[str, list[Document]]) -> None:
    for name, documents in rendered.items():
        tag = "0.1.0-gpu" if name.startswith("gpu") else "0.1.0"
        images = {container["image"] for one in workloads(documents) for container in containers(one)}
        assert images == {f"registry.example.com/vecsvc:{tag}"}
        assert tag.startswith(vecsvc.__version__)


def test_the_gpu_overlay_asks_for_a_gpu_and_uses_it(rendered: dict[str, list[Document]]) -> None:
    for name in ("gpu", "gpu-volume"):
        container = spec_of(named(rendered[name], "Deployment", "vecsvc"))["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and flag(container, "--device") == "cuda"


# ------------------------------------------------------------------------------------------------- vecsvc


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from vecsvc.cli import main; main()", *words]


@functools.cache
def flags_in_help(command: str) -> frozenset[str]:
    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0, f"vecsvc {command}: {done.output}"
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.output))


def used_flags(rendered: dict[str, list[Document]]) -> set[tuple[str, str]]:
    all_args = [c["args"] for documents in rendered.values() for one in workloads(documents) for c in containers(one)]
    return {(args[0], word) for args in all_args for word in [*args[1:], ""] if not word or word.startswith("--")}


def test_every_command_and_flag_exists(rendered: dict[str, list[Document]]) -> None:
    for command, word in sorted(used_flags(rendered)):
        if command in PENDING["commands"] or f"{command} {word}" in PENDING["flags"]:
            continue
        assert command in cli.commands, f"there is no vecsvc {command}"
        assert not word or word in flags_in_help(command), f"vecsvc {command} has no {word}"


def test_nothing_is_pending_that_exists_or_is_not_used(rendered: dict[str, list[Document]]) -> None:
    used = used_flags(rendered)
    assert PENDING["commands"] <= {command for command, _ in used}
    assert not PENDING["commands"] & set(cli.commands), "has come to exist: take it out of PENDING"
    for pending in PENDING["flags"]:
        command, word = pending.split()
        assert (command, word) in used, pending
        assert word not in flags_in_help(command), f"{pending} has come to exist: take it out of PENDING"
    assert PENDING["metrics"] <= {name.removesuffix("_bucket") for _, name, _ in queried(rendered)}
    for name in PENDING["metrics"]:
        assert not exists(name), f"{name} has come to exist: take it out of PENDING"


def test_variables_and_settings_files_are_read_by_vecsvc(documents: list[Document], tmp_path: Path) -> None:
    for one in workloads(documents):
        for container in containers(one):
            names = [variable["name"] for variable in container.get("env", [])]
            for source in container.get("envFrom", []):
                names += named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
            # Links to services and names that nothing reads would both be refused here.
            read_settings(ServeSettings, "serve", {}, dict.fromkeys(names, "1"))
    for one in of_kind(documents, "ConfigMap"):
        if "vecsvc.toml" in one["data"]:
            file = tmp_path / "vecsvc.toml"
            file.write_text(one["data"]["vecsvc.toml"])
            assert read_settings(ServeSettings, "serve", {}, {}, file).kernels == "/tmp/kernels"


def test_ports_in_manifests_are_those_that_vecsvc_opens(documents: list[Document]) -> None:
    defaults = {"http": ServeSettings().port, "admin": ServeSettings().admin_port, "shard": None}
    words = {"http": "--port", "admin": "--admin-port", "shard": "--shard-port"}
    hosts = {"http": "--host", "admin": "--admin-host", "shard": "--shard-host"}
    for one, container in serving(documents):
        for name, number in ports(one).items():
            assert number == int(flag(container, words[name]) or defaults[name] or 0)
            assert flag(container, hosts[name]) == "0.0.0.0", "on loopback nobody else in the cluster reaches it"


def test_front_doors_look_for_nodes_under_a_name_that_resolves_to_shards(
    rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    documents = rendered["sharded"]
    front_door = named(documents, "Deployment", "vecsvc")
    volumes = {volume["name"]: volume for volume in spec_of(front_door)["volumes"]}
    file = tmp_path / "route.toml"
    file.write_text(named(documents, "ConfigMap", volumes["route"]["configMap"]["name"])["data"]["route.toml"])
    known = read_topology(file)
    assert known.names and not known.nodes
    for name in known.names:
        service = named(documents, "Service", name.host)["spec"]
        assert service["clusterIP"] == "None" and service["ports"][0]["port"] == name.port
        assert selected(documents, service["selector"]) == of_kind(documents, "StatefulSet")


def build_corpus(folder: Path, shards: int) -> dict[str, str]:
    """An index where the pods have theirs. Returns what their words mean here."""
    pq.write_table(pa.table({"id": np.arange(50), "vector": list(make_vectors(50, 8))}), folder / "corpus.parquet")
    words = ["build-index", "corpus.parquet", "--out", "indexes", "--shards", str(shards)]
    subprocess.run(command(*words), cwd=folder, check=True, capture_output=True, timeout=60)
    return {"/data/indexes": str(folder / "indexes"), "0.0.0.0": "127.0.0.1"}


def settings_here(documents: list[Document], folder: Path) -> dict[str, str]:
    data = next(one["data"] for one in of_kind(documents, "ConfigMap") if "vecsvc.toml" in one["data"])
    (folder / "vecsvc.toml").write_text(data["vecsvc.toml"].replace("/tmp/kernels", str(folder / "kernels")))
    return {"/etc/vecsvc/settings/vecsvc.toml": str(folder / "vecsvc.toml")}


def as_here(container: Document, here: dict[str, str]) -> list[str]:
    return command(*(here.get(word, word) for word in container["args"]), "--port", "0", "--admin-port", "0")


def probe(container: Document, admin_port: int) -> None:
    """Ask what the kubelet asks, once `running` has found /readyz green."""
    for name in ("startup", "readiness", "liveness"):
        path = container[f"{name}Probe"]["httpGet"]["path"]
        with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}{path}", timeout=5) as answer:
            assert answer.status == 200


def test_what_a_pod_of_single_runs_gets_ready_and_has_the_routes_of_its_probes(
    rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    container = spec_of(named(rendered["single"], "Deployment", "vecsvc"))["containers"][0]
    here = build_corpus(tmp_path, 1) | settings_here(rendered["single"], tmp_path)
    with running(as_here(container, here)) as server:
        probe(container, server.admin_port)


def test_what_the_pods_of_sharded_run_answers_over_all_shards(
    rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    documents = rendered["sharded"]
    here = build_corpus(tmp_path, 2) | settings_here(documents, tmp_path)
    nodes = []
    with contextlib.ExitStack() as pods:
        for workload in of_kind(documents, "StatefulSet")[:2]:
            container, port = spec_of(workload)["containers"][0], free_port()
            own = {"$(SHARD)": labels(workload)["vecsvc/shard"], flag(container, "--shard-port") or "": str(port)}
            own[flag(container, "--drain-s") or ""] = "0"  # nobody has to be told of the end of this test
            server = pods.enter_context(running(as_here(container, here | own)))
            probe(container, server.admin_port)
            nodes.append(f"127.0.0.1:{port}")
        (tmp_path / "route.toml").write_text(f"nodes = {json.dumps(nodes)}")
        here["/etc/vecsvc/route/route.toml"] = str(tmp_path / "route.toml")
        container = spec_of(named(documents, "Deployment", "vecsvc"))["containers"][0]
        front_door = pods.enter_context(running(as_here(container, here)))
        probe(container, front_door.admin_port)
        question = json.dumps({"vector": [1.0] * 8, "k": 50}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{front_door.port}/search", question, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
    assert found["coverage"] == {"shards_ok": 2, "shards_total": 2, "degraded": []}
    assert sorted(hit["id"] for hit in found["results"]) == list(range(50))


# -------------------------------------------------------------------------------------- dashboard and alerts


def queried(rendered: dict[str, list[Document]]) -> Iterator[tuple[str, str, set[str]]]:
    """(query, metric, the labels that the query names) of the dashboard and the alerts."""
    documents = rendered["sharded-secured"]
    dashboard = json.loads(named(documents, "ConfigMap", "vecsvc-dashboard")["data"]["dashboard.json"])
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    rules = [rule for one in of_kind(documents, "PrometheusRule") for g in one["spec"]["groups"] for rule in g["rules"]]
    queries += [rule["expr"] for rule in rules]
    assert len(queries) > 20
    for query in queries:
        names = set(re.findall(r"\bvecsvc_[a-z_]+", query))
        by = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
        by |= {label for matchers in re.findall(r"{([^}]*)}", query) for label in re.findall(r"(\w+) *[=!]", matchers)}
        assert names, query
        for name in names:
            yield query, name, by


@functools.cache
def families() -> dict[str, set[str] | None]:
    """Every metric that vecsvc's sources declare, with its labels where they stand in the same call."""
    found: dict[str, set[str] | None] = {}
    for path in (ROOT / "vecsvc").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            lists = [one for one in call.args if isinstance(one, ast.Tuple | ast.List)]
            own = {str(word.value) for one in lists for word in one.elts if isinstance(word, ast.Constant)}
            for one in call.args:
                if isinstance(one, ast.Constant) and re.fullmatch(r"vecsvc_[a-z_]+", str(one.value)):
                    found[str(one.value)] = own or None
    return found


def family_of(name: str) -> str | None:
    names = (name, name.removesuffix("_total"), name.removesuffix("_bucket"))
    return next((one for one in names if one in families()), None)


def exists(name: str) -> bool:
    return family_of(name) is not None


def test_queries_name_metrics_and_labels_that_vecsvc_has(rendered: dict[str, list[Document]]) -> None:
    for query, name, used in queried(rendered):
        family = family_of(name)
        if name.removesuffix("_bucket") in PENDING["metrics"]:
            continue
        assert family is not None, f"there is no {name}: {query}"
        own = families()[family]
        # The others are put there by Prometheus, or by the histogram.
        assert own is None or used <= {*own, "namespace", "pod", "le"}, query


def test_the_dashboard_is_one_that_grafana_can_draw() -> None:
    dashboard = json.loads((K8S / "components" / "observability" / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", []):
            assert target["expr"].count("(") == target["expr"].count(")") and target["datasource"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps(panels)
    assert set(re.findall(r"\$\{?(\w+)", text)) <= variables | {"__rate_interval"}


# --------------------------------------------------------------------------------- shards.py, the Containerfile


def written_by_shards_py(folder: Path, shards: str) -> dict[str, bytes]:
    shutil.copytree(K8S, folder)
    subprocess.run([sys.executable, str(folder / "shards.py"), shards], check=True, capture_output=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shards_are_as_the_script_writes_them(tmp_path: Path) -> None:
    now = {str(path.relative_to(K8S)): path.read_bytes() for path in K8S.rglob("*") if path.is_file()}
    shards = sum(name.startswith("overlays/sharded/shards/") for name in now) - 1
    assert written_by_shards_py(tmp_path / "k8s", str(shards)) == now


@pytest.mark.parametrize("shards", [1, 5, 40])
def test_one_command_sets_how_many_shards_are_built_and_served(shards: int, tmp_path: Path) -> None:
    written_by_shards_py(tmp_path / "k8s", str(shards))
    documents = render(tmp_path / "k8s" / "overlays" / "sharded")
    served = [labels(one)["vecsvc/shard"] for one in of_kind(documents, "StatefulSet")]
    assert sorted(served, key=int) == [str(shard) for shard in range(shards)]
    assert len(of_kind(documents, "PodDisruptionBudget")) == shards + 1
    job = named(render(tmp_path / "k8s" / "jobs" / "build"), "Job", "vecsvc-build")
    assert job["spec"]["completions"] == shards and job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] <= 32
    build = next(container for container in containers(job) if container["name"] == "build")
    assert {"name": "SHARDS", "value": str(shards)} in build["env"]
    assert flag(build, "--shard") == "$(SHARD)/$(SHARDS)" and flag(build, "--shards") == "$(SHARDS)"


@pytest.mark.parametrize("shards", ["0", "257", "many"])
def test_a_number_of_shards_that_cannot_be_is_refused(shards: str, tmp_path: Path) -> None:
    script = tmp_path / "shards.py"
    shutil.copy(K8S / "shards.py", script)
    done = subprocess.run([sys.executable, str(script), shards], capture_output=True, text=True)
    assert done.returncode == 2 and shards in done.stderr
    assert list(tmp_path.iterdir()) == [script]


def test_build_and_publish_speak_of_the_same_version_and_place(rendered: dict[str, list[Document]]) -> None:
    build, publish = (of_kind(rendered[name], "ConfigMap")[0] for name in JOBS)
    assert build["data"] == publish["data"] and build["metadata"]["name"] == publish["metadata"]["name"]
    store = next(one["data"] for one in of_kind(rendered["sharded"], "ConfigMap") if "STORE" in one["data"])
    assert store.items() <= build["data"].items()


def test_the_container_file_copies_what_there_is_and_runs_as_the_pods_do() -> None:
    lines = (K8S / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [(line.split()[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]
    copied = [word for step, rest in steps if step == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    assert packages | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} == set(
        copied
    )
    assert {"cpu", "gpu", "hnsw"} <= project["project"]["optional-dependencies"].keys()
    last = dict(steps)
    assert last["USER"] == "65532:65532" and last["ENTRYPOINT"] == '["vecsvc"]'
    install = next(i for i, (step, rest) in enumerate(steps) if step == "RUN" and "pip install" in rest)
    assert any(step == "ENV" and "HNSWLIB_NO_NATIVE=1" in rest for step, rest in steps[:install])
    assert [step for step, _ in steps].count("FROM") == 2
