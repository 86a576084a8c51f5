"""What the schemas of Kubernetes cannot know of k8s/: that names meet, and that pods do no more than they need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions
from kustomize import Document, containers, load, render
from manifests import (
    CONFIGURATIONS,
    CUSTOM,
    JOBS,
    K8S,
    ROOT,
    flag,
    labels,
    named,
    of_kind,
    ports,
    rendered,
    selected,
    serving,
    spec_of,
    workloads,
    write_overlay,
)

import vecsvc
from vecsvc.config import ServeSettings

NEWEST = list(dict.fromkeys(version.rpartition(".")[0] for version in all_versions()))[-3:]


@pytest.fixture(params=CONFIGURATIONS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return rendered()[request.param]


# ------------------------------------------------------------------------------------------ schemas, rendering


@pytest.mark.parametrize("version", NEWEST)
def test_every_manifest_is_valid_strictly(version: str) -> None:
    different = {json.dumps(one, sort_keys=True) for documents in rendered().values() for one in documents}
    different |= {json.dumps(one, sort_keys=True) for one in load(K8S / "components" / "example-secrets.yaml")}
    checked = 0
    for text in sorted(different):
        document = json.loads(text)
        if document["kind"] not in CUSTOM:
            assert kubernetes_validate.validate(document, version, strict=True) == version
            checked += 1
    assert checked > 40


def test_the_validator_would_notice_a_misspelt_key() -> None:
    document = json.loads(json.dumps(named(rendered()["single"], "Deployment", "vecsvc")))
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, NEWEST[-1], strict=True)


def test_only_the_component_for_it_has_custom_resources() -> None:
    for name, documents in rendered().items():
        assert bool(of_kind(documents, *CUSTOM)) == ("observability" in CONFIGURATIONS[name][1])
        assert all(one["apiVersion"].startswith("monitoring.coreos.com/") for one in of_kind(documents, *CUSTOM))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_kubectl_renders_the_same(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(write_overlay(name, tmp_path))], capture_output=True, text=True, check=True
    )

    def keyed(documents: list[Document]) -> dict[tuple[str, str], Document]:
        return {(one["kind"], one["metadata"]["name"]): one for one in documents}

    theirs = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert len(theirs) == len(rendered()[name])
    assert keyed(theirs) == keyed(rendered()[name])


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


def test_autoscalers_have_a_target_that_sets_no_replicas_itself() -> None:
    for documents in rendered().values():
        for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
            target = scaler["spec"]["scaleTargetRef"]
            found = named(documents, target["kind"], target["name"])
            assert found["apiVersion"] == target["apiVersion"] and "replicas" not in found["spec"]
            # A share of what is requested is a share of nothing where nothing is.
            assert all("cpu" in container["resources"]["requests"] for container in containers(found))
    assert of_kind(rendered()["sharded"], "HorizontalPodAutoscaler")


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
def test_each_port_is_open_to_those_it_is_for_and_nobody_else(name: str) -> None:
    documents = rendered()[name]
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


def test_every_image_is_the_one_of_the_overlay() -> None:
    for name, documents in rendered().items():
        tag = "0.1.0-gpu" if name.startswith("gpu") else "0.1.0"
        images = {container["image"] for one in workloads(documents) for container in containers(one)}
        assert images == {f"registry.example.com/vecsvc:{tag}"}
        assert tag.startswith(vecsvc.__version__)


def test_the_gpu_overlay_asks_for_a_gpu_and_uses_it() -> None:
    for name in ("gpu", "gpu-volume"):
        container = spec_of(named(rendered()[name], "Deployment", "vecsvc"))["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and flag(container, "--device") == "cuda"


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


def test_build_and_publish_speak_of_the_same_version_and_place() -> None:
    build, publish = (of_kind(rendered()[name], "ConfigMap")[0] for name in JOBS)
    assert build["data"] == publish["data"] and build["metadata"]["name"] == publish["metadata"]["name"]
    store = next(one["data"] for one in of_kind(rendered()["sharded"], "ConfigMap") if "STORE" in one["data"])
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
