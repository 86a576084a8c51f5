"""Nodes are killed, slowed, cut, garbled, restarted and replaced under load: no question fails that could be answered,
no answer is wrong, and what cannot be answered is said at once and truthfully."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_cluster import Cluster, Load, Question, cluster, end, nodes, questions, start, wait_until
from service import Corpus, Service, build, corpora, work_folder

from vecsvc.fan_out import HEDGE_BURST
from vecsvc.ids import id_hash
from vecsvc.storage import IndexFolder

SHARDS = ["0", "0", "1", "1"]
PATIENT = {"timeout_ms": 20_000}  # so that a busy machine fails no question


def corpus() -> Corpus:
    """Every vector is there four times, so that answers have ties across shards."""
    return corpora()["sharded"]


def version(number: int) -> Corpus:
    """The same vectors, but a row says which version it is of."""
    return dataclasses.replace(corpus(), fields=[{"part": 1000 * number + i} for i in range(len(corpus().ids))])


@functools.cache
def folder() -> Path:
    out = work_folder() / "cluster"
    build(version(1), out, "rows", "v1", kind="exact", metric="cosine", shards=2, fields="part")
    return out


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    with cluster(folder(), SHARDS) as made:
        yield made


@pytest.fixture
def whole(shared: Cluster) -> Iterator[Cluster]:
    """Two shards with two replicas each, all of them well; whatever a test did is mended after it."""
    yield shared
    shared.heal()


def asked() -> list[Question]:
    return questions(corpus(), **PATIENT)


def counted(door: Service, before: dict[Any, float] | None = None) -> dict[str, float]:
    """What a front door counted of its nodes, since `before`."""
    found: dict[str, float] = defaultdict(float)
    for (name, labels), value in door.metrics().items():
        if name in ("vecsvc_hedges_total", "vecsvc_shard_retries_total", "vecsvc_shard_ejections_total"):
            key = labels[0][1] if labels else name
            found[key] = value - (before or {}).get((name, labels), 0.0)
    return found


def of_shards(*shards: int) -> Corpus:
    """The rows that these shards hold."""
    rows = [i for i, id in enumerate(corpus().ids) if id_hash(id) % 2 in shards]
    return Corpus([corpus().ids[i] for i in rows], corpus().vectors[rows], [corpus().fields[i] for i in rows], "cosine")


# --------------------------------------------------------------------------------------------- one replica


def test_a_replica_killed_under_load_fails_no_question(whole: Cluster) -> None:
    with Load([whole.door], asked()) as load:
        load.wait(100)
        whole.members[0].kill()
        load.wait(200)
        assert nodes(whole.door)["down"] == 1
        whole.members[0].start()
        wait_until(lambda: nodes(whole.door)["up"] == 4)
        load.wait(100)
    load.check()


@pytest.mark.parametrize(
    "fault",
    [
        {"delay_ms": 100},
        {"question_delay_ms": 100},
        {"hole": True},
        {"drip_bytes": 1, "drip_ms": 2},
        {"cut_after": 0},
        {"cut_after": 300},
        {"cut_after": 2000},
        {"garbage": True},
        {"flip_every": 500},
        {"refuse": True},
    ],
    ids=str,
)
def test_a_failing_replica_fails_no_question_and_falsifies_none(whole: Cluster, fault: dict[str, Any]) -> None:
    before = whole.door.metrics()
    with Load([whole.door], asked()) as load:
        load.wait(30)
        whole.members[2].fail(**fault)
        load.wait(150)
        # It may be the slower one already, that only a copy meets, of which there is one for a hundred questions.
        wait_until(lambda: any(counted(whole.door, before).values()), lambda: counted(whole.door, before))
        whole.members[2].fail()
        load.wait(30)
    load.check()
    found = counted(whole.door, before)
    assert found["sent"] + found["probe_sent"] <= 0.05 * 2 * load.answered + 2 * HEDGE_BURST + 10, found


def test_a_replica_that_garbles_every_answer_is_ejected_and_comes_back_when_it_stopped(whole: Cluster) -> None:
    member = whole.members[1]
    before = whole.door.metrics()
    door = whole.door
    with Load([door], asked()) as load:
        member.fail(garbage=True, spare=1)  # it says what it holds, and then no answer can be read
        member.cluster.proxies.cut(member.number)
        wait_until(lambda: counted(door, before)["vecsvc_shard_ejections_total"] >= 1, lambda: counted(door, before))
        member.fail()
        wait_until(lambda: nodes(door)["up"] == 4, lambda: nodes(door))
    load.check()


def test_second_questions_stay_within_their_budget_with_one_slow_replica(whole: Cluster) -> None:
    before = whole.door.metrics()
    whole.members[3].fail(delay_ms=150)
    with Load([whole.door], asked()) as load:
        load.wait(600)
    load.check()
    found = counted(whole.door, before)
    assert 0 < found["sent"] + found["probe_sent"] <= 0.05 * 2 * load.answered + 2 * HEDGE_BURST, found


# ------------------------------------------------------------------------------------------- a whole shard


def search(door: Service, row: int = 3, **more: Any) -> Any:
    return door.post("/search", {"vector": [float(x) for x in corpus().vectors[row] + 0.01], "k": 7, **more})


def expected(shards: Corpus, row: int = 3) -> list[Any]:
    return shards.ids_of(corpus().vectors[row] + 0.01, 7)


def test_a_shard_that_is_gone_is_said_at_once_or_left_out_where_that_is_asked_for(whole: Cluster) -> None:
    door, gone = whole.door, whole.of("1")
    for member in gone:
        member.kill()
    wait_until(lambda: nodes(door)["down"] == 2)
    began = time.monotonic()
    reply = search(door, timeout_ms=20_000)
    assert reply.status == 503 and reply.json()["error"]["code"] == "shards_missing" and "shard 1" in reply.message
    assert time.monotonic() - began < 5
    assert reply.headers["retry-after"]
    for row in range(20):
        answer = search(door, row, partial=True, include=["fields"]).json()
        assert [hit["id"] for hit in answer["results"]] == expected(of_shards(0), row)
        assert (answer["coverage"]["shards_ok"], answer["coverage"]["shards_total"]) == (1, 2)
        assert any("shard 1" in why for why in answer["coverage"]["degraded"])
    batch = door.post("/search/batch", {"vectors": corpus().vectors[:5].tolist(), "k": 3, "partial": True}).json()
    assert batch["coverage"]["shards_ok"] == 1
    assert door.metric("vecsvc_shards_missing", index="rows") == 1
    assert door.metric("vecsvc_partial_answers_total", index="rows") >= 21
    # Where the row of a question by id lies decides whether it can be answered.
    there, missing = (next(id for id in corpus().ids if id_hash(id) % 2 == shard) for shard in (0, 1))
    unknown = door.post("/search", {"id": missing, "partial": True})
    assert unknown.status == 503 and "may be there, so that its vector is not known" in unknown.message
    assert door.post("/search", {"id": there}).status == 503
    assert door.post("/search", {"id": there, "partial": True}).status == 200
    # What is gone is gone for every front door, so that none of them calls itself unready for it.
    assert door.get("/readyz").status == door.get("/livez").status == 200
    for member in gone:
        member.start()
    wait_until(lambda: search(door).status == 200)
    answer = search(door).json()
    assert [hit["id"] for hit in answer["results"]] == expected(corpus())
    assert answer["coverage"] == {"shards_ok": 2, "shards_total": 2, "degraded": []}


def test_a_shard_that_hangs_ends_in_a_504_in_time_or_is_left_out(whole: Cluster) -> None:
    door = whole.door
    search(door)
    for member in whole.of("1"):
        member.fail(delay_ms=4000)  # answers stay away, and pings come back in time
    for partial in (False, True):
        began = time.monotonic()
        reply = search(door, partial=partial, timeout_ms=500)
        took_s = time.monotonic() - began
        assert 0.4 < took_s < 3
        if partial:
            assert [hit["id"] for hit in reply.results] == expected(of_shards(0))
            assert reply.json()["coverage"]["shards_ok"] == 1
        else:
            assert reply.status == 504 and "shard 1" in reply.message


def test_a_front_door_without_any_node_is_unready_and_says_why(whole: Cluster) -> None:
    for member in whole.members:
        member.fail(refuse=True)
    door = whole.door
    wait_until(lambda: door.get("/readyz").status == 503)
    reply = door.get("/readyz")
    assert "rows: no node for shards 0, 1 of 2" in reply.message
    assert door.get("/livez").status == 200
    assert search(door).status == search(door, partial=True).status == 503
    whole.proxies.heal()
    wait_until(lambda: door.get("/readyz").status == 200)
    wait_until(lambda: search(door).status == 200)


# ------------------------------------------------------------------------------------------- coming and going


def test_every_node_is_restarted_one_after_the_other_and_no_question_fails(whole: Cluster) -> None:
    with Load([whole.door], asked()) as load:
        for _ in range(2):
            for member in whole.members:
                member.stop()
                member.start()
                # As Kubernetes does: one that opens its index still, or compiles kernels, is not asked yet.
                member.wait_ready()
                wait_until(lambda: nodes(whole.door)["up"] == 4, lambda: nodes(whole.door))
        load.wait(20)
    load.check()


def test_a_front_door_is_restarted_and_another_one_answers_meanwhile(whole: Cluster) -> None:
    second = whole.add_door()
    second.wait_for("ready")
    try:
        with Load([second, whole.door], asked(), clients=2) as load:
            load.wait(30)
            assert second.stop() == 0
            load.wait(30)
        load.check()
    finally:
        whole.doors.remove(second)
        end(second)
    killed = whole.add_door()
    killed.wait_for("ready")
    killed.process.kill()
    killed.process.wait(30)
    whole.doors.remove(killed)
    again = whole.add_door(port=killed.port)
    again.wait_for("ready")
    assert [hit["id"] for hit in search(again).results] == expected(corpus())
    whole.doors.remove(again)
    end(again)
    # The nodes do not care.
    assert search(whole.door).status == 200


def test_nodes_appear_and_vanish_with_the_file_and_a_broken_file_changes_nothing(whole: Cluster) -> None:
    door = whole.door
    whole.write_topology([whole.members[0], whole.members[2]])
    wait_until(lambda: nodes(door) == {"up": 2, "ejected": 0, "draining": 0, "down": 0})
    assert search(door).status == 200
    gone = whole.members[1].address
    assert not [labels for _, labels in door.metrics() if ("node", gone) in labels]
    whole.topology.write_text("nodes = [")
    time.sleep(0.3)
    assert nodes(door)["up"] == 2 and search(door).status == 200 and door.get("/readyz").status == 200
    whole.topology.unlink()
    time.sleep(0.3)
    assert nodes(door)["up"] == 2 and search(door).status == 200
    whole.write_topology()
    wait_until(lambda: nodes(door)["up"] == 4)


def test_every_address_of_a_name_is_a_node(whole: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "named.toml"
    file.write_text(f"dns = {json.dumps([m.address.replace('127.0.0.1', 'localhost') for m in whole.members])}")
    door = start("route", f"--config={file}")
    try:
        wait_until(lambda: nodes(door)["up"] == 4, lambda: nodes(door))
        wait_until(lambda: search(door).status == 200)
    finally:
        end(door)


def test_a_front_door_waits_for_nodes_that_start_after_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    file = tmp_path / "nodes.toml"
    file.write_text(f'nodes = ["127.0.0.1:{port}"]')
    door = start("route", f"--config={file}")
    try:
        assert door.get("/livez").status == 200
        wait_until(
            lambda: "Connect call failed" in door.get("/readyz").message or "refused" in door.get("/readyz").message
        )
        reply = search(door)
        assert reply.status == 503 and f"127.0.0.1:{port}" in reply.message
        assert door.post("/indexes/rows/search", {"vector": [1.0] * 8}).status == 503
        node = start("serve", str(folder()), shard_port=port)
        try:
            wait_until(lambda: door.get("/readyz").status == 200, lambda: door.get("/readyz"))
            assert [hit["id"] for hit in search(door).results] == expected(corpus())
        finally:
            end(node)
        wait_until(lambda: door.get("/readyz").status == 503)
    finally:
        end(door)


def test_a_full_replica_is_spared_and_where_all_are_full_that_is_said() -> None:
    """One question at a time is taken by each node, and all of them are long."""
    with cluster(folder(), SHARDS, max_in_flight=1, inline_ms=0) as made:
        body = json.dumps({"vectors": corpus().vectors[:100].tolist(), "k": 20, **PATIENT}).encode()
        seen: set[int] = set()

        def wrong(answer: Any) -> str | None:
            return None if len(answer["results"]) == 100 else "not whole"

        with Load([made.door], [Question(body, wrong)], clients=6, path="/search/batch") as load:
            wait_until(lambda: load.answered >= 40)
        seen = {int(failure.split()[0]) for failure in load.failures}
        assert seen <= {429}, load.failures[:3]
        assert load.answered > len(load.failures)
        assert search(made.door).status == 200


# --------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def rolled(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes that look for another version only when told to."""
    shutil.copytree(folder(), tmp_path / "all")
    with cluster(tmp_path / "all", SHARDS, reload_poll_s=0) as made:
        yield made


def versioned() -> list[Question]:
    """Questions whose answer says of every hit which version it is from."""

    def whole_version(question: Question) -> Question:
        def wrong(answer: Any) -> str | None:
            number = int(answer["index"]["version"].removeprefix("v"))
            parts = {hit["fields"]["part"] // 1000 for hit in answer["results"]}
            return question.wrong(answer) if parts == {number} else f"version {number}, rows of {parts}"

        return Question(question.body, wrong)

    return [whole_version(question) for question in questions(corpus(), include=["fields"], **PATIENT)]


def publish(directory: Path, number: int) -> None:
    build(version(number), directory, "rows", f"v{number}", kind="exact", metric="cosine", shards=2, fields="part")


def reload(cluster: Cluster, number: int) -> None:
    reply = cluster.members[number].running.ask("POST", "/reload", admin=True)
    assert reply.status == 200 and not reply.json()["problems"]


def serves(door: Service) -> str:
    found: str = search(door).json()["index"]["version"]
    return found


def test_a_version_is_rolled_out_and_back_under_load_and_no_answer_mixes_two(rolled: Cluster) -> None:
    door = rolled.door
    with Load([door], versioned()) as load:
        load.wait(30)
        publish(rolled.directory, 2)
        for number in (0, 1, 2):
            reload(rolled, number)
            load.wait(40)
            if number < 2:
                assert serves(door) == "v1", "shard 1 does not have it yet"
        reload(rolled, 3)
        wait_until(lambda: serves(door) == "v2")
        load.wait(40)
        IndexFolder(rolled.directory / "rows").rollback("v1")
        for number in (2, 0, 3, 1):
            reload(rolled, number)
            load.wait(20)
        wait_until(lambda: serves(door) == "v1")
        # One after the other, forth and back, while the one before may not be everywhere yet.
        folder = IndexFolder(rolled.directory / "rows")
        for at in range(4):
            folder.rollback("v2" if at % 2 == 0 else "v1")
            for number in range(4):
                reload(rolled, (number + at) % 4)
                load.wait(3)
    load.check()
    assert set(load.versions) == {"v1", "v2"}
    assert door.metric("vecsvc_version_flips_total", index="rows") >= 3


def test_a_node_that_never_gets_a_version_delays_it_by_flip_wait_alone(rolled: Cluster) -> None:
    door = rolled.door
    with Load([door], versioned(), clients=2) as load:
        publish(rolled.directory, 2)
        for number in (0, 2, 3):
            reload(rolled, number)
        began = time.monotonic()
        wait_until(lambda: serves(door) == "v2")
        assert time.monotonic() - began < 30
        load.wait(30)
        # From here on shard 0 has one replica for v2; the other one is asked no more.
        rolled.members[0].stop()
        wait_until(lambda: serves(door) == "v1")  # rather all of the version before than half of the new one
        rolled.members[0].start()
        rolled.members[0].wait_ready()
        wait_until(lambda: serves(door) == "v2")
    load.check()


def test_two_builds_of_one_name_are_never_mixed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    build(version(2), other, "rows", "v1", kind="exact", metric="cosine", shards=2, fields="part")

    def one_build(question: Question) -> Question:
        def wrong(answer: Any) -> str | None:
            builds = {hit["fields"]["part"] // 1000 for hit in answer["results"]}
            return question.wrong(answer) if len(builds) == 1 else f"rows of builds {builds}"

        return Question(question.body, wrong)

    asked = [one_build(question) for question in questions(corpus(), include=["fields"], **PATIENT)]
    with cluster(folder(), SHARDS) as made:
        with Load([made.door], asked) as load:
            load.wait(20)
            made.directory = other
            for number in (0, 2, 1, 3):
                made.members[number].stop()
                made.members[number].start()
                wait_until(lambda: nodes(made.door)["up"] == 4)
                load.wait(20)
        load.check()
        assert search(made.door, include=["fields"]).results[0]["fields"]["part"] // 1000 == 2


def test_a_version_that_nobody_asks_for_stays_while_the_next_is_not_everywhere(tmp_path: Path) -> None:
    shutil.copytree(folder(), tmp_path / "all")
    with cluster(tmp_path / "all", ["0", "1"], reload_poll_s=0, previous_version_s=2.0) as made:
        publish(made.directory, 2)
        reload(made, 0)
        time.sleep(4)
        assert serves(made.door) == "v1"
        reload(made, 1)
        wait_until(lambda: serves(made.door) == "v2")
        # And now nobody asks for the version before, so the nodes let it go.
        held = "the version before is held still"
        wait_until(lambda: search(made.door).status == 200 and _held(made) == {"v2"}, lambda: held)


def _held(made: Cluster) -> set[str]:
    """The versions whose files the nodes have open."""
    found: set[str] = set()
    for member in made.members:
        maps = Path(f"/proc/{member.running.process.pid}/maps").read_text()
        found |= {v for v in ("v1", "v2") if f"/rows/{v}/" in maps}
    return found
