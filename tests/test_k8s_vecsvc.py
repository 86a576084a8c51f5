"""vecsvc is as the manifests of k8s/ think: its flags, settings, ports, probes and metrics; what pods run is run."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from click.testing import CliRunner
from corpora import make_vectors
from kustomize import Document, containers, render
from manifests import (
    CONFIGURATIONS,
    K8S,
    ROOT,
    command,
    flag,
    free_port,
    labels,
    named,
    of_kind,
    ports,
    rendered,
    selected,
    serving,
    spec_of,
    workloads,
)

from vecsvc.cli import cli
from vecsvc.config import ServeSettings, read_settings
from vecsvc.topology import read_topology

sys.path.insert(0, str(ROOT / "benchmarks"))

from common import running


@pytest.fixture(params=CONFIGURATIONS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return rendered()[request.param]


# ------------------------------------------------------------------------------------------------- vecsvc


@functools.cache
def flags_in_help(command: str) -> frozenset[str]:
    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0, f"vecsvc {command}: {done.output}"
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.output))


def used_flags() -> set[tuple[str, str]]:
    all_args = [c["args"] for documents in rendered().values() for one in workloads(documents) for c in containers(one)]
    return {(args[0], word) for args in all_args for word in [*args[1:], ""] if not word or word.startswith("--")}


def test_every_command_and_flag_exists() -> None:
    for name, word in sorted(used_flags()):
        assert name in cli.commands, f"there is no vecsvc {name}"
        assert not word or word in flags_in_help(name), f"vecsvc {name} has no {word}"


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


def test_front_doors_look_for_nodes_under_a_name_that_resolves_to_shards(tmp_path: Path) -> None:
    documents = rendered()["sharded"]
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


def test_what_a_pod_of_single_runs_gets_ready_and_has_the_routes_of_its_probes(tmp_path: Path) -> None:
    container = spec_of(named(rendered()["single"], "Deployment", "vecsvc"))["containers"][0]
    here = build_corpus(tmp_path, 1) | settings_here(rendered()["single"], tmp_path)
    with running(as_here(container, here)) as server:
        probe(container, server.admin_port)


def test_what_the_pods_of_sharded_run_answers_over_all_shards(tmp_path: Path) -> None:
    documents = rendered()["sharded"]
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


@pytest.fixture
def endpoint() -> Iterator[str]:
    with s3.serving() as endpoint:
        yield endpoint


def test_what_the_jobs_run_brings_a_version_into_the_store_and_sidecars_fetch_their_shard(
    endpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }
    with contextlib.closing(s3.client(endpoint)) as client:
        client.create_bucket(Bucket="vecsvc")
    shutil.copytree(K8S, tmp_path / "k8s")
    subprocess.run([sys.executable, str(tmp_path / "k8s" / "shards.py"), "2"], check=True)
    pq.write_table(pa.table({"id": np.arange(50), "vector": list(make_vectors(50, 8))}), tmp_path / "corpus.parquet")
    job, config = sorted(render(tmp_path / "k8s" / "jobs" / "build"), key=lambda one: one["kind"], reverse=True)
    assert (job["kind"], config["kind"]) == ("Job", "ConfigMap")
    known = {**config["data"], "CORPUS": str(tmp_path / "corpus.parquet"), "SHARDS": "2"}

    def run(container: Document, folder: str, **more: str) -> None:
        words = [
            re.sub(r"\$\(([A-Z_]+)\)", lambda found: {**known, **more}[found[1]], word) for word in container["args"]
        ]
        here = {"/data/indexes": str(tmp_path / folder), "/tmp/kernels": str(tmp_path / "kernels")}
        if "--watch" in words:
            del words[words.index("--watch") : words.index("--watch") + 2]
        words = command(*(here.get(word, word) for word in words))
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    for shard in ("0", "1"):
        for container in containers(job):
            run(container, f"build-{shard}", SHARD=shard)
    run(next(containers(named(rendered()["publish"], "Job", "vecsvc-publish"))), "publish")
    run(next(containers(of_kind(rendered()["sharded"], "StatefulSet")[1])), "pulled", SHARD="1")
    version = tmp_path / "pulled" / known["INDEX"] / known["VERSION"]
    assert (version.parent / "CURRENT").read_text().strip() == known["VERSION"]
    assert [folder.name for folder in (version / "shards").iterdir()] == ["001"]


# -------------------------------------------------------------------------------------- dashboard and alerts


def queried() -> Iterator[tuple[str, str, set[str]]]:
    """(query, metric, the labels that the query names) of the dashboard and the alerts."""
    documents = rendered()["sharded-secured"]
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


def test_queries_name_metrics_and_labels_that_vecsvc_has() -> None:
    for query, name, used in queried():
        family = family_of(name)
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
