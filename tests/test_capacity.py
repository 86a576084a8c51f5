"""The simulator of clusters agrees with what queueing theory knows, and the planner with arithmetic by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import make_vectors
from numpy.typing import NDArray

from vecsvc.manifest import read_manifest
from vecsvc.storage import IndexFolder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import capacity  # noqa: E402
import cluster_model  # noqa: E402
from capacity_plan import MOST_SIMULATED_REPLICAS, Demand, FrontDoor, Node, Profile, plan  # noqa: E402
from cluster_model import (  # noqa: E402
    Cluster,
    mean_wait_ms,
    on_one_machine,
    share_not_whole,
    share_that_meets,
    simulate,
)
from common import write_corpus  # noqa: E402

Times = NDArray[np.float64]
EXPONENTIAL = np.random.default_rng(1).exponential(1.0, 200_000)  # mean 1 ms
ALWAYS_1_MS = np.ones(1)
ONE_IN_100_SLOW = np.where(np.arange(10_000) < 100, 100.0, 1.0)


@pytest.mark.parametrize(("threads", "rate_qps"), [(1, 500), (4, 2600)])
def test_waiting_for_exponential_service_is_erlangs(threads: int, rate_qps: float) -> None:
    cluster = Cluster(shards=16, replicas=1, threads=threads, rate_qps=rate_qps)
    waited = simulate(cluster, EXPONENTIAL, queries=10_000).call_ms.mean() - 1
    assert waited == pytest.approx(mean_wait_ms(rate_qps, 1.0, threads), rel=0.1)


def test_erlangs_mean_wait_of_one_thread_is_the_textbooks() -> None:
    assert mean_wait_ms(500, 1.0, 1) == pytest.approx(0.5 / (1 - 0.5))
    assert mean_wait_ms(1000, 1.0, 1) == math.inf


def test_waiting_for_constant_service_is_half_of_that() -> None:
    waited = simulate(Cluster(shards=4, replicas=1, rate_qps=600), ALWAYS_1_MS, queries=10_000).call_ms.mean() - 1
    assert waited == pytest.approx(0.6 / (2 * (1 - 0.6)), rel=0.1)


def test_the_last_of_n_exponential_calls_takes_the_harmonic_number() -> None:
    outcome = simulate(Cluster(shards=100, replicas=1, rate_qps=0.01), EXPONENTIAL, queries=3000)
    assert outcome.latency_ms.mean() == pytest.approx((1 / np.arange(1, 101)).sum(), rel=0.02)


def test_one_call_in_100_slow_and_100_calls_make_63_queries_in_100_slow() -> None:
    assert share_that_meets(0.01, 100) == pytest.approx(0.634, abs=0.001)
    cluster = Cluster(shards=100, replicas=1, rate_qps=1, hedge_budget=0)
    slow = simulate(cluster, ONE_IN_100_SLOW, queries=2000).latency_ms > 50
    assert slow.mean() == pytest.approx(share_that_meets(0.01, 100), abs=0.03)


def test_hedges_save_queries_from_calls_that_are_rarely_slow() -> None:
    # With a thread for each, so that a slow search holds nobody up. At one query a second probes would take the budget.
    cluster = Cluster(shards=100, replicas=2, threads=16, rate_qps=100)
    outcome = simulate(cluster, ONE_IN_100_SLOW, queries=2000)
    # What stays slow is what is slow twice.
    assert (outcome.latency_ms > 50).mean() < 0.03
    assert outcome.hedges / outcome.calls == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("load", [0.2, 0.6, 1.1])
def test_hedges_never_exceed_their_budget(load: float, common: bool) -> None:
    for budget in (0.01, 0.05):
        cluster = Cluster(
            shards=6, replicas=3, rate_qps=3000 * load, hedge_budget=budget, common_budget=common, hedge_quantile=0.5
        )
        outcome = simulate(cluster, EXPONENTIAL, queries=1000)
        assert 0 < outcome.hedges <= budget * outcome.calls


def test_a_lone_replica_is_never_hedged() -> None:
    for cluster in (Cluster(shards=3, replicas=1, rate_qps=500), Cluster(shards=3, replicas=2, down=1, rate_qps=500)):
        assert simulate(cluster, EXPONENTIAL, queries=1000).hedges == 0


def test_a_common_budget_is_no_worse_where_what_waits_is_called_back() -> None:
    # A shard that takes it all does not drown of it: second calls that wait when the answer is there are never served.
    own = Cluster(shards=16, replicas=4, rate_qps=2800)
    p99 = [simulate(one, EXPONENTIAL, queries=5000).quantiles()[1] for one in (own, replace(own, common_budget=True))]
    assert p99[1] == pytest.approx(p99[0], rel=0.3)


def test_a_call_that_waits_when_the_other_is_answered_is_never_served() -> None:
    cluster = Cluster(shards=8, replicas=4, rate_qps=3600, hedge_budget=0.3, hedge_quantile=0.5, hedge_min_ms=0.5)
    outcome = simulate(cluster, ALWAYS_1_MS, queries=10_000)
    # Were all of them served, there would be more work than threads, and waits of seconds.
    assert cluster.load(1.0) * (1 + outcome.hedges / outcome.calls) > 1.1
    assert outcome.quantiles()[1] < 20


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_two_replicas_chosen_by_load_wait_little_longer_than_for_one_queue(load: float) -> None:
    cluster = Cluster(shards=16, replicas=2, rate_qps=2000 * load, hedge_budget=0)
    waited = simulate(cluster, EXPONENTIAL, queries=10_000).call_ms.mean() - 1
    one_queue, any_replica = mean_wait_ms(2000 * load, 1.0, 2), mean_wait_ms(1000 * load, 1.0, 1)
    assert one_queue < waited < (one_queue + any_replica) / 2


def test_the_better_of_two_replicas_waits_less_than_any() -> None:
    cluster = Cluster(shards=8, replicas=4, rate_qps=3200, hedge_budget=0)
    waited = [
        simulate(replace(cluster, two_choices=two), EXPONENTIAL, queries=3000).call_ms.mean() - 1
        for two in (True, False)
    ]
    assert waited[0] < waited[1] / 2


def test_a_replica_that_is_gone_leaves_its_work_to_the_others() -> None:
    cluster = Cluster(shards=16, replicas=2, down=1, rate_qps=500)
    assert cluster.load(1.0) == pytest.approx(0.5)
    waited = simulate(cluster, EXPONENTIAL, queries=10_000).call_ms.mean() - 1
    assert waited == pytest.approx(mean_wait_ms(500, 1.0, 1), rel=0.1)


def test_late_replicas_are_avoided_once_they_were_seen_late() -> None:
    cluster = Cluster(shards=4, replicas=2, rate_qps=300, slow_share=1 / 8, slow_ms=100, hedge_budget=0)
    # Seen in the warm-up, and from then on at most where the other one has very much to do.
    assert (simulate(cluster, EXPONENTIAL, queries=4000).call_ms > 100).mean() < 0.001
    anyhow = simulate(replace(cluster, two_choices=False), EXPONENTIAL, queries=4000).call_ms > 100
    assert anyhow.mean() == pytest.approx(1 / 8, abs=0.02)


def test_a_replica_that_is_avoided_gets_a_copy_a_second_after_its_last_answer_and_no_question() -> None:
    cluster = Cluster(shards=4, replicas=2, rate_qps=300, slow_share=1 / 8, slow_ms=1000)
    outcome = simulate(cluster, EXPONENTIAL, queries=6000)
    # In 20 seconds; a copy is answered after one second, though nobody waits for it. Of the others one may rest, too.
    assert 20 / 2 - 1 <= outcome.probes <= 20 / 2 + 4
    assert not (outcome.call_ms > 1000).any()


def test_a_replica_that_does_not_answer_is_known_by_what_it_has_outlived() -> None:
    silent = Cluster(shards=1, replicas=2, rate_qps=700, slow_share=0.5, slow_ms=1e9)
    lost = [(simulate(silent, EXPONENTIAL, queries=1000, seed=seed).call_ms > 1e8).mean() for seed in range(20)]
    # Taken for as fast as one that was never asked, it would get questions whenever the other has some to do.
    assert np.mean(lost) < 0.003


def test_a_second_call_goes_to_another_replica() -> None:
    cluster = Cluster(shards=1, replicas=2, rate_qps=50, slow_share=0.5, slow_ms=100, two_choices=False)
    late = [
        (simulate(one, EXPONENTIAL, queries=5000).call_ms > 100).mean()
        for one in (cluster, replace(cluster, hedge_budget=1.0))
    ]
    assert late[0] > 0.4 and late[1] == 0


def test_probes_find_a_replica_again_that_was_slow_once() -> None:
    # One of the two is always late by 20 ms. The other takes two seconds once in 4,000 calls, and looks worse then.
    seldom = np.where(np.arange(4000) < 1, 2000.0, 1.0)
    never_hedged = Cluster(
        shards=1, replicas=2, threads=8, rate_qps=100, hedge_min_ms=1e9, slow_share=0.5, slow_ms=20.0
    )
    late = [
        np.mean([(simulate(one, seldom, queries=100_000, seed=seed).call_ms > 10).mean() for seed in range(4)])
        for one in (never_hedged, replace(never_hedged, hedge_budget=0))
    ]
    assert late[0] < 0.05 < 0.15 < late[1]


def test_room_that_has_to_grow_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = Cluster(shards=5, asked=3, replicas=3, rate_qps=6000)
    much = simulate(crowded, EXPONENTIAL, queries=1000)
    monkeypatch.setattr(cluster_model, "ROOM", 1)
    little = simulate(crowded, EXPONENTIAL, queries=1000)
    assert np.array_equal(much.call_ms, little.call_ms) and much.hedges == little.hedges


def test_asking_some_shards_loads_each_with_its_share() -> None:
    cluster = Cluster(shards=20, asked=2, replicas=1, rate_qps=5000)
    assert cluster.load(1.0) == pytest.approx(0.5)
    outcome = simulate(cluster, EXPONENTIAL, queries=10_000)
    assert outcome.call_ms.shape[1] == 2
    assert outcome.call_ms.mean() - 1 == pytest.approx(mean_wait_ms(500, 1.0, 1), rel=0.1)


def test_the_same_seed_gives_the_same_figures() -> None:
    cluster = Cluster(shards=5, asked=3, replicas=3, rate_qps=1500, slow_share=0.1, slow_ms=5)
    first, second, other = (simulate(cluster, EXPONENTIAL, queries=500, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.latency_ms, second.latency_ms) and first.hedges == second.hedges
    assert not np.array_equal(first.latency_ms, other.latency_ms)


def test_one_machine_is_one_queue_for_all_shards() -> None:
    single = on_one_machine(Cluster(shards=1, rate_qps=1000), EXPONENTIAL, 2, queries=40_000)
    assert single.call_ms.mean() - 1 == pytest.approx(mean_wait_ms(1000, 1.0, 2), rel=0.1)
    four = on_one_machine(Cluster(shards=4, rate_qps=1), ALWAYS_1_MS, 2, queries=200)
    assert np.median(four.latency_ms) == 2  # two calls on each core, one after the other


@pytest.mark.parametrize(
    ("cluster", "service_ms", "queries"),
    [
        (Cluster(shards=3, asked=4, rate_qps=1), ALWAYS_1_MS, 10),
        (Cluster(shards=3, replicas=2, down=2, rate_qps=1), ALWAYS_1_MS, 10),
        (Cluster(shards=3, threads=0, rate_qps=1), ALWAYS_1_MS, 10),
        (Cluster(shards=3, hedge_quantile=1.0, rate_qps=1), ALWAYS_1_MS, 10),
        (Cluster(shards=3, rate_qps=1), np.empty(0), 10),
        (Cluster(shards=3, rate_qps=1), np.array([1.0, np.nan]), 10),
        (Cluster(shards=10_000, rate_qps=1), ALWAYS_1_MS, 10_000_000),
    ],
)
def test_what_cannot_be_simulated_is_refused(cluster: Cluster, service_ms: Times, queries: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        simulate(cluster, service_ms, queries=queries)


def test_the_share_of_answers_that_miss_a_shard() -> None:
    assert share_not_whole(0.999, 1, 1) == pytest.approx(0.001)
    assert share_not_whole(0.999, 2, 400) == pytest.approx(1 - (1 - 1e-6) ** 400)
    assert share_not_whole(1.0, 2, 400) == 0


# ------------------------------------------------------------------------------------------------ capacity.py

PROFILE = Profile(service_ms=[1.0, 3.0], vectors=1_000_000, bytes_per_vector=1000.0, dim=100)
NODE = Node(memory_gib=1e9 / 2**30, cores=10, filled=1.0, busy=0.5, versions=1)


def test_shards_come_from_memory_and_replicas_from_the_rate() -> None:
    found = plan(Demand(vectors=8e6, rate_qps=10_000), PROFILE, NODE, FrontDoor(query_us=100, call_us=50))
    # 8 GB on nodes of 1 GB; searches of 2 ms, 5 of 10 cores busy, so a node answers 2,500 calls a second.
    assert (found.shards, found.asked, found.replicas, found.nodes) == (8, 8, 4, 32)
    assert found.bound_by == "searching" and found.shard_cores == 320 and found.load == pytest.approx(0.5)
    assert found.front_cores == pytest.approx(10_000 * (100 + 8 * 50) / 1e6 / 0.5)
    assert found.cluster().load(2.0) == pytest.approx(0.5)


def test_asking_a_quarter_of_the_shards_takes_a_quarter_of_the_replicas_but_two() -> None:
    some = plan(Demand(vectors=8e6, rate_qps=10_000, share=0.25), PROFILE, NODE, FrontDoor())
    assert (some.shards, some.asked, some.replicas) == (8, 2, 2)
    assert some.bound_by == "memory"


def test_two_versions_at_once_take_twice_the_shards_and_larger_shards_longer() -> None:
    twice = plan(Demand(vectors=8e6, rate_qps=1), PROFILE, replace(NODE, versions=2), FrontDoor())
    assert twice.shards == 16
    large = plan(Demand(vectors=1e8, rate_qps=1), PROFILE, replace(NODE, memory_gib=1000), FrontDoor())
    assert large.service_ms.mean() == pytest.approx(2.0 * math.log(1e8) / math.log(1e6))


def test_many_replicas_are_simulated_by_a_few_at_the_same_load() -> None:
    busy = plan(Demand(vectors=1e6, rate_qps=200_000), PROFILE, NODE, FrontDoor())
    assert busy.replicas == 80 and busy.cluster().replicas == MOST_SIMULATED_REPLICAS
    assert busy.cluster().load(2.0) == pytest.approx(busy.load)


def test_a_quantile_is_told_only_where_samples_were_that_rare() -> None:
    assert capacity.resolved(0.99, calls=10, samples=1000)
    assert not capacity.resolved(0.99, calls=10, samples=999)


def test_a_measured_index_is_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(make_vectors(400, 8), tmp_path / "rows.parquet")
    program = [sys.executable, "-c", "from vecsvc.cli import main; main()"]
    build = [*program, "build-index", str(corpus), "--out", "indexes", "--shards", "2"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    few = ("--vectors", "1e6,1e9", "--rates", "1e5", "--shares", "1,.1", "--queries", "200")
    measuring = ("--measure", "indexes/rows", "--save", "profile.json", "--out", "figures", *few)
    command = [sys.executable, str(ROOT / "benchmarks" / "capacity.py"), *measuring]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    profile: dict[str, Any] = json.loads((tmp_path / "profile.json").read_text())
    folder = IndexFolder(tmp_path / "indexes" / "rows")
    manifest = read_manifest(folder.version(str(folder.current())))
    assert profile["vectors"] == max(shard.size for shard in manifest.shards) and profile["dim"] == 8
    each = manifest.bytes_per_vector
    assert each is not None and profile["bytes_per_vector"] == pytest.approx(each.index + each.vectors + each.rest)
    assert len(profile["service_ms"]) == 180 and min(profile["service_ms"]) > 0
    figures = json.loads((tmp_path / "figures" / "capacity.json").read_text())
    assert len(figures["plans"]) == 4 and figures["simulated"] and figures["machine"]["cores"]
    # In this process, where the simulator is compiled already.
    monkeypatch.setattr(sys, "argv", ["capacity.py", "--profile", str(tmp_path / "profile.json"), *few])
    capacity.main()
    # Everything but the line of the machine's and the file's names is figures, and a seed gives the same ones.
    assert capsys.readouterr().out.splitlines()[:30] == done.stdout.splitlines()[:30]


def test_a_cluster_that_is_as_simulated_is_found_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = np.random.default_rng(3).gamma(4.0, 0.25, 5000)
    runs = []
    for rate in (200.0, 800.0):
        cluster = Cluster(shards=4, replicas=2, rate_qps=rate)
        latency = simulate(cluster, service, queries=3000, seed=99).latency_ms + 0.5
        figures = {"shards": 4, "replicas": 2, "rate_qps": rate, "service_ms": service.tolist()}
        runs.append(
            {**figures, "latency_ms": latency.tolist(), "overhead_ms": 0.5, "machine": "further keys are welcome"}
        )
    (tmp_path / "cluster.json").write_text(json.dumps(runs))
    words = ["--check", str(tmp_path / "cluster.json"), "--queries", "3000", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["capacity.py", *words])
    capacity.main()
    found = json.loads((tmp_path / "capacity.json").read_text())["check"]
    assert len(found) == 2
    for one in found:
        assert one["simulated"] == pytest.approx(one["measured"], rel=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "truncated"),
        ('{"shards": 1}', "replicas"),
        ('{"shards": 1, "replicas": 1, "rate_qps": 1, "service_ms": [], "latency_ms": [1]}', "at least one"),
        ('{"shards": 1, "replicas": 1, "rate_qps": 1, "service_ms": [-1], "latency_ms": [1]}', "not negative"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text(text)
    with pytest.raises(SystemExit, match=said):
        capacity.read(tmp_path / "cluster.json", capacity.Run)
