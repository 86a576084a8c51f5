"""The command line: one call a command, results a person can read, errors in one line with the right exit code."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from forked import run

from vecsvc import cli
from vecsvc.config import BuildSettings, ServeSettings
from vecsvc.errors import MEND_VERSION
from vecsvc.storage import IndexFolder, Lease

ROOT = Path(__file__).parents[1]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(7).standard_normal((60, 4)).astype(np.float32)
    table = pa.table({"id": [f"r{i}" for i in range(60)], "vector": list(vectors), "label": list(range(60))})
    path = tmp_path / "corpus.parquet"
    pq.write_table(table, path)
    return path


def test_a_corpus_alone_is_enough_to_build_inspect_verify_and_search(corpus: Path) -> None:
    built = run("build-index", corpus.name, cwd=corpus.parent)
    assert built.returncode == 0, built.stderr
    assert "60 x 4 cosine, exact" in built.stdout and "recall@10 1.0000" in built.stdout
    assert "serve it: vecsvc serve indexes/corpus" in built.stdout
    shown = run("inspect", "indexes", cwd=corpus.parent).stdout
    assert "60 x 4 float32, cosine, exact" in shown and "<- default" in shown
    assert "a vector  0 bytes of index, 18.1 of vectors, " in shown
    assert "files and the manifest are what was written" in run("verify", "indexes", cwd=corpus.parent).stdout
    found = run("search", "indexes", "--id", "r3", "-k", "2", cwd=corpus.parent)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 2 and "2 hits" in found.stderr
    by_vector = run("search", "indexes", "--vector", "1,0,0,0", "-k", "1", "--json", cwd=corpus.parent)
    assert len(json.loads(by_vector.stdout)["results"]) == 1


def test_json_is_for_machines(corpus: Path) -> None:
    built = json.loads(run("build-index", corpus.name, "--json", cwd=corpus.parent).stdout)
    assert built["manifest"]["spec"]["kind"] == "exact"
    assert json.loads(run("inspect", "indexes", "--json", cwd=corpus.parent).stdout)["corpus"]["corpus"]["rows"] == 60
    versions = json.loads(run("inspect", "indexes", "--versions", "--json", cwd=corpus.parent).stdout)
    [version] = versions["corpus"]
    assert version.pop("created").startswith("20") and version["version"].startswith("20")
    assert version == {"version": version["version"], "serves": True, "damage": None}
    report = json.loads(run("doctor", "--json").stdout)
    assert report["kinds"]["exact"] == "ok" and report["packages"]["numpy"] == np.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for name in ("cpu", "models") for one in project["optional-dependencies"][name]]
    wanted = {re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0] for one in (*project["dependencies"], *extras)}
    installed = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    assert wanted & installed <= report["packages"].keys() and "pytest" not in report["packages"]


def test_versions_are_listed_rolled_back_and_deleted(corpus: Path) -> None:
    for version in ("v1", "v2", "v3"):
        assert run("build-index", corpus.name, "--version", version, cwd=corpus.parent).returncode == 0
    assert run("rollback", "indexes", cwd=corpus.parent).stdout.startswith("v3 -> v2")
    assert run("rollback", "indexes", "--to", "v2", cwd=corpus.parent).stdout == "v2 serves already\n"
    listed = run("inspect", "indexes", "--versions", cwd=corpus.parent).stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["v1", "v2", "v3"] and listed[1].endswith("Z  <- serves")
    (corpus.parent / "indexes/corpus/v2/shards/000/rows.npy").write_bytes(b"short")
    (corpus.parent / "indexes/corpus/v3/manifest.json").write_bytes(b"{}")
    told = run("inspect", "indexes", "--versions", cwd=corpus.parent)
    assert told.returncode == 0, "a list of damaged versions is a list"
    _, second, third = told.stdout.splitlines()
    assert "  <- serves  " in second and "rows.npy: has 5 bytes, the manifest says " in second
    assert "v3  no date  " in third and "manifest.json: is not what was written" in third
    lease = Lease.take(corpus.parent / "indexes/corpus/v1", exclusive=False)
    assert lease is not None
    kept = run("gc", "indexes", "--keep", "0", cwd=corpus.parent).stdout
    assert kept == "corpus: deleted v3\ncorpus: left v1, which a process holds\n"
    lease.release()
    assert run("gc", "indexes", "--keep", "0", cwd=corpus.parent).stdout == "corpus: deleted v1\n"


def test_a_rollback_to_a_damaged_version_changes_nothing_and_exits_1(corpus: Path) -> None:
    for version in ("v1", "v2", "v3"):
        assert run("build-index", corpus.name, "--version", version, cwd=corpus.parent).returncode == 0
    (corpus.parent / "indexes/corpus/v2/shards/000/rows.npy").write_bytes(b"short")
    (corpus.parent / "indexes/corpus/v1/manifest.json").write_bytes(b"{}")
    for arguments, file in (([], "v2/shards/000/rows.npy: has 5 bytes"), (["--to", "v1"], "v1/manifest.json: is not")):
        done = run("rollback", "indexes", *arguments, cwd=corpus.parent)
        assert (done.returncode, done.stdout) == (1, "") and file in done.stderr
        assert done.stderr.rstrip().endswith(MEND_VERSION) and len(done.stderr.splitlines()) == 1
        assert IndexFolder(corpus.parent / "indexes/corpus").current() == "v3"


def test_what_a_first_build_that_died_left_is_told_and_deleted(corpus: Path) -> None:
    staging = corpus.parent / "indexes/dead/.staging-v1/shards"
    staging.mkdir(parents=True)
    (corpus.parent / "indexes/dead/.state-v1").write_text("{}")
    for place in ("indexes", "indexes/dead"):
        told = run("inspect", place, cwd=corpus.parent)
        assert told.returncode == 2 and "dead has no version yet: a build or a pull is at work or died" in told.stderr
        assert f"vecsvc gc {corpus.parent / place}" in told.stderr
    assert run("gc", "indexes", cwd=corpus.parent).stdout == "dead: deleted .staging-v1\n"
    assert list((corpus.parent / "indexes/dead").iterdir()) == []


def test_shards_of_a_version_that_was_not_published_are_told(corpus: Path) -> None:
    assert run("build-index", corpus.name, "--shard", "0/2", "--version", "v1", cwd=corpus.parent).returncode == 0
    told = run("inspect", "indexes", cwd=corpus.parent)
    assert told.returncode == 2 and "corpus has no version yet, only shards of one (.part-v1-000)" in told.stderr
    assert f"vecsvc publish {corpus.parent / 'indexes/corpus'} --version VERSION" in told.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "gc", "serve"])
def test_a_store_is_no_folder_to_work_in_and_the_remedy_is_named(command: str) -> None:
    told = run(command, "s3://bucket/prefix")
    assert told.returncode == 2 and "s3://bucket/prefix is in an object store, which push, pull, " in told.stderr


def test_a_folder_without_current_says_which_version_may_serve(corpus: Path) -> None:
    assert run("build-index", corpus.name, "--version", "v1", cwd=corpus.parent).returncode == 0
    (corpus.parent / "indexes/corpus/CURRENT").unlink()
    remedy = f"no version serves; let one of v1 serve: vecsvc rollback {corpus.parent / 'indexes/corpus'} --to VERSION"
    for words in (("inspect", "indexes"), ("push", "indexes", "store"), ("search", "indexes", "--id", "r1")):
        assert remedy in run(*words, cwd=corpus.parent).stderr
    assert run("rollback", "indexes", "--to", "v1", cwd=corpus.parent).stdout.startswith("none -> v1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--encoder", "nope"), "no encoder folder nope; give default, or what vecsvc encoder import has made"),
        (("--encoder-memory-mb", "1"), "memory_mb must be 0 or between 8 and"),
        (("--encoder-provider", "tpu"), "device 'tpu' is not in this onnxruntime"),
    ],
)
def test_a_service_does_not_start_with_an_encoder_that_never_opens(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    told = run("serve", str(tmp_path), "--port", "0", "--admin-port", "0", *words)
    assert told.returncode == 2 and message in told.stderr


def test_a_text_that_is_none_is_refused_in_one_line(corpus: Path) -> None:
    assert run("build-index", corpus.name, cwd=corpus.parent).returncode == 0
    told = run("search", "indexes", "ab\udcff", cwd=corpus.parent)
    assert told.returncode == 2 and "TEXT has a lone surrogate" in told.stderr and len(told.stderr.splitlines()) == 1


def test_what_is_for_watching_alone_is_refused_without(tmp_path: Path) -> None:
    told = run("pull", str(tmp_path), str(tmp_path / "out"), "--keep", "2")
    assert told.returncode == 2 and "--keep is for --watch" in told.stderr
    told = run("pull", str(tmp_path), str(tmp_path / "out"), "--watch", "1", "--again")
    assert told.returncode == 2 and "--again is for one pull" in told.stderr


def test_a_build_that_finds_nothing_to_resume_says_so(corpus: Path) -> None:
    first, second = (run("build-index", corpus.name, *more, cwd=corpus.parent) for more in ([], ["--resume"]))
    assert (first.returncode, second.returncode) == (0, 0)
    assert "nothing to resume" not in first.stderr and "nothing to resume: no build of this corpus" in second.stderr


def test_a_search_shows_what_is_no_character_to_read_spelled_out(corpus: Path) -> None:
    ids = ["plain", "two\nlines", "\x1b[31mred", "\u202ertl", "ä 日本"]
    table = pa.table(
        {
            "id": ids,
            "vector": pa.array([[1.0, float(i)] for i in range(5)], pa.list_(pa.float32(), 2)),
            "text": ["\x1b[2J", "None", "it's", "日本", None],
            "price": [74.1, None, 3.0, 4.0, 5.0],
        }
    )
    pq.write_table(table, corpus.parent / "odd.parquet")
    assert run("build-index", "odd.parquet", "--fields", "text,price", cwd=corpus.parent).returncode == 0
    shown = run("search", "indexes/odd", "--vector", "1,0", "-k", "5", cwd=corpus.parent).stdout
    assert len(shown.splitlines()) == 5 and "\x1b" not in shown and "\u202e" not in shown
    for part in ("two\\nlines  text='None'  price=null", "\\x1b[31mred", "\\u202ertl", "ä 日本  text=null  price=5.0"):
        assert part in shown, shown


def test_a_search_opens_the_index_that_it_names_and_no_other(corpus: Path) -> None:
    for name in ("one", "two"):
        run("build-index", corpus.name, "--name", name, cwd=corpus.parent)
    ask = ("search", "indexes", "--id", "r3", "-k", "2")
    both = run(*ask, cwd=corpus.parent)
    assert both.returncode == 2 and "holds several indexes, name one with --index: one, two" in both.stderr
    none = run(*ask, "--index", "three", cwd=corpus.parent)
    assert none.returncode == 2 and "holds no index 'three'; there are: one, two" in none.stderr
    [vectors] = corpus.parent.glob("indexes/two/*/shards/000/vectors.npy")
    vectors.write_bytes(b"")
    assert run(*ask, "--index", "one", cwd=corpus.parent).returncode == 0
    assert "vectors.npy: has 0 bytes" in run(*ask, "--index", "two", cwd=corpus.parent).stderr


def test_a_search_takes_a_filter_and_the_settings_of_its_kind(tmp_path: Path) -> None:
    vectors = np.random.default_rng(7).standard_normal((200, 4)).astype(np.float32)
    table = pa.table({"id": list(range(200)), "vector": list(vectors), "year": [2000 + i % 20 for i in range(200)]})
    pq.write_table(table, tmp_path / "years.parquet")
    built = run(
        "build-index",
        "years.parquet",
        "--kind",
        "faiss",
        "--param",
        "factory=IVF4,Flat",
        "--fields",
        "year",
        cwd=tmp_path,
    )
    assert built.returncode == 0, built.stderr
    ask = ("search", "indexes", "--id", "3", "-k", "4", "--json")
    found = run(*ask, "--filter", '{"year": {"$gte": 2018}}', "--param", "nprobe=2", cwd=tmp_path)
    hits = json.loads(found.stdout)["results"]
    assert len(hits) == 4 and all(hit["fields"]["year"] >= 2018 for hit in hits)
    exact = json.loads(run(*ask, "--param", "exact=true", cwd=tmp_path).stdout)
    assert exact["stats"]["strategy"] == "exact" and exact["stats"]["visited"] == 200
    for arguments, message in (
        (["--filter", "{year: 1}"], "--filter takes JSON: "),
        (["--filter", "[1]"], "$.filter: Expected `object`, got `array`; the value is [1]"),
        (["--filter", '{"yeer": 1}'], "filter: 'yeer' is no stored field of 'years': year"),
        (["--param", "ef_serch=2"], "unknown parameter 'ef_serch'; faiss knows: nprobe"),
        (["--param", "nprobe=many"], 'params.nprobe must be an integer, got "many"'),
        (["--param", "nprobe"], "--param takes KEY=VALUE, got 'nprobe'"),
        (["--vector", "1,2,3,4"], "give exactly one of text, vector and id, got vector and id"),
        (["-k", "0"], "k must be an integer between 1 and 1000, got 0"),
    ):
        done = run(*ask, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    for question, message in (
        (["--vector", "1,nan,2,3"], "--vector takes finite numbers"),
        (["--vector", "1,x"], "--vector takes numbers separated by commas"),
        (["--id", "x"], "has no id 'x'"),
        ([" "], "text is empty"),
        ([], "give exactly one of text, vector and id, got none"),
    ):
        done = run("search", "indexes", *question, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_damaged_version_fails_verify_with_exit_code_1(corpus: Path) -> None:
    run("build-index", corpus.name, cwd=corpus.parent)
    [vectors] = corpus.parent.glob("indexes/corpus/*/shards/000/vectors.npy")
    vectors.write_bytes(vectors.read_bytes()[:-1])
    done = run("verify", "indexes", cwd=corpus.parent)
    assert done.returncode == 1 and "vectors.npy: has " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build-index", "none.parquet"], "none.parquet"),
        (["build-index", "corpus.parquet", "--kind", "annoy"], "'annoy' is no kind of index; known are auto, exact,"),
        (["build-index", "corpus.parquet", "--metric", "hamming"], "must be one of l2, ip, cosine, got 'hamming'"),
        (["build-index", "corpus.parquet", "--kind", "hnsw", "--param", "mm=3"], "unknown parameter 'mm'; hnsw knows:"),
        (["build-index", "corpus.parquet", "--kind", "hnsw", "--param", "m"], "--param takes KEY=VALUE, got 'm'"),
        (["build-index", "corpus.parquet", "--name", "../x"], "index name '../x' must be"),
        (["build-index", "corpus.parquet", "--version", "a/b"], "version 'a/b' must be"),
        (["build-index", "corpus.parquet", "--shards", "many"], "shards must be an integer, got 'many'"),
        (["build-index", "corpus.parquet", "--vector-column", "v"], "label"),
        (["serve", "nowhere"], "nowhere is no folder"),
        (["serve", ".", "--port", "-1"], "port must be between 0 and 65535, got '-1'"),
        (["inspect", "."], "holds no index; build one"),
        (["search", ".", "text"], "holds no index"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["build-index"], "Missing argument 'CORPUS'"),
        (["build-index", "corpus.parquet", "--settings", "none.toml"], "no settings file none.toml"),
    ],
)  # fmt: skip
def test_a_mistake_of_the_user_is_one_line_with_the_remedy_and_exit_code_2(
    corpus: Path, arguments: list[str], message: str
) -> None:
    done = run(*arguments, cwd=corpus.parent)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("vecsvc: ")]) <= 1
    assert not list(corpus.parent.glob("indexes/*/*/manifest.json"))


def test_settings_come_from_vecsvc_toml_and_the_environment(corpus: Path) -> None:
    (corpus.parent / "vecsvc.toml").write_text('[build]\nname = "from-file"\nmetric = "l2"\n')
    done = run("build-index", corpus.name, cwd=corpus.parent, env={"VECSVC_METRIC": "ip"})
    assert "60 x 4 ip" in done.stdout and "indexes/from-file/" in done.stdout


@pytest.mark.parametrize(("command", "cls"), [("build-index", BuildSettings), ("serve", ServeSettings)])
def test_help_tells_every_setting(command: str, cls: type) -> None:
    shown = " ".join(CliRunner().invoke(cli.cli, [command, "--help"]).output.split())
    for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
        assert f"--{name.replace('_', '-')} " in shown
    assert "[default: none]" in shown


def test_serving_imports_no_builder_and_no_library_that_it_does_not_need() -> None:
    script = (
        "import sys, vecsvc.cli, vecsvc.process\n"
        "print([m for m in ('index_builders', 'hnswlib', 'faiss', 'sklearn', 'onnx', 'onnxruntime', 'moto')"
        " if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_doctor_names_packages_that_are_in_each_others_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from vecsvc import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if "faiss" in name else None)
    [problem] = doctor.examine().problems
    assert "faiss-cpu and faiss-gpu" in problem and "pip uninstall -y faiss-cpu faiss-gpu" in problem


def test_a_refused_corpus_leaves_nothing_behind(corpus: Path) -> None:
    twice = pa.concat_tables([pq.read_table(corpus)] * 2)
    pq.write_table(twice, corpus.parent / "twice.parquet")
    done = run("build-index", "twice.parquet", cwd=corpus.parent)
    assert done.returncode == 2 and "has that id already" in done.stderr
    assert list((corpus.parent / "indexes" / "twice").iterdir()) == []


def test_a_glob_names_the_index_after_its_folder(corpus: Path) -> None:
    (corpus.parent / "parts").mkdir()
    corpus.rename(corpus.parent / "parts" / "a.parquet")
    assert "published indexes/parts/" in run("build-index", "parts/*.parquet", cwd=corpus.parent).stdout


def test_what_can_never_be_served_is_refused_at_once(tmp_path: Path) -> None:
    done = run("serve", str(tmp_path), "--shards", "x")
    assert done.returncode == 2 and "--shards takes numbers and ranges like 0,2-3" in done.stderr
