"""Promises of the corpus reader on an object store, kept against a real S3 server in this process (moto)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3

import index_builders.corpus as corpus_module
from index_builders.corpus import open_corpus
from vecsvc import stores
from vecsvc.errors import BadRow, CorpusError, CorpusUnreadable

BUCKET = "corpora"
KEYS = ["one.parquet", "many/b.parquet", "many/a.parquet", "many/sub/c d+e%20é.parquet"]

pytestmark = pytest.mark.timeout(30)  # what is not there must be told in seconds


def parquet(ids: list[str], **options: Any) -> bytes:
    vectors = np.random.default_rng(7).standard_normal((len(ids), 8), dtype=np.float32)
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "vector": list(vectors), "key": ids}), sink, **options)
    return sink.getvalue()


def put(endpoint: str, key: str, body: bytes) -> None:
    with contextlib.closing(s3.client(endpoint)) as client:
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=key, Body=body)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.serving() as endpoint:
        for key in KEYS:
            put(endpoint, key, parquet([f"{key}-{i}" for i in range(3)]))
        put(endpoint, "many/", b"")  # the marker that consoles leave for a folder
        put(endpoint, "many/notes.txt", b"no corpus")
        put(endpoint, "broken.parquet", parquet(["a"])[:-9])
        yield endpoint


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> pytest.MonkeyPatch:
    s3.set_environment(endpoint, monkeypatch, tmp_path)
    return monkeypatch


def read_ids(source: str) -> list[str]:
    corpus = open_corpus(source, metric="l2")
    return [id for batch in corpus.read_batches(2) for id in batch.ids.to_pylist()]


def ids_in(*keys: str) -> list[str]:
    return [f"{key}-{i}" for key in keys for i in range(3)]


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("one.parquet", ["one.parquet"]),
        ("many", ["many/a.parquet", "many/b.parquet", KEYS[3]]),
        ("many/", ["many/a.parquet", "many/b.parquet", KEYS[3]]),
        ("many/*.parquet", ["many/a.parquet", "many/b.parquet"]),
        ("many/[b-z].parquet", ["many/b.parquet"]),
        ("many/?.parquet", ["many/a.parquet", "many/b.parquet"]),
        ("**/[!ab]*.parquet", [KEYS[3], "one.parquet"]),
        ("many/sub/*", [KEYS[3]]),
        (KEYS[3], [KEYS[3]]),
    ],
)
def test_a_file_a_folder_and_a_glob_are_read_as_on_a_disk(source: str, keys: list[str]) -> None:
    assert read_ids(f"s3://{BUCKET}/{source}") == ids_in(*keys)


def test_rows_hashes_and_vectors_are_those_that_were_put() -> None:
    corpus = open_corpus(f"s3://{BUCKET}/one.parquet", metric="cosine", fields="key")
    batches = list(corpus.read_batches(100))
    expected = np.random.default_rng(7).standard_normal((3, 8), dtype=np.float32)
    assert (corpus.rows, corpus.dim, corpus.path) == (3, 8, f"s3://{BUCKET}/one.parquet")
    assert batches[0].vectors is not None
    assert np.array_equal(batches[0].vectors, expected)
    assert batches[0].fields is not None
    assert batches[0].fields.column(0).to_pylist() == ids_in("one.parquet")


def test_many_requests_bring_one_large_row_group(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "READ_AHEAD_BYTES", 1 << 18)
    ids = [f"r{i}" for i in range(50_000)]
    put(endpoint, "large/l.parquet", parquet(ids))
    assert read_ids(f"s3://{BUCKET}/large/l.parquet") == ids


def test_sha256_and_identity_are_those_of_the_bytes_and_names() -> None:
    corpus = open_corpus(f"s3://{BUCKET}/one.parquet", metric="l2")
    assert corpus.sha256() == hashlib.sha256(parquet(ids_in("one.parquet"))).hexdigest()
    many = open_corpus(f"s3://{BUCKET}/many", metric="l2")
    names = ["many/a.parquet", "many/b.parquet", KEYS[3]]
    lines = [f"{hashlib.sha256(parquet(ids_in(n))).hexdigest()}  {n.removeprefix('many/')}\n" for n in names]
    assert many.sha256() == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert many.identity() == open_corpus(f"s3://{BUCKET}/many/", metric="l2").identity() != corpus.identity()


def test_an_object_that_is_replaced_while_it_is_read_is_refused(endpoint: str) -> None:
    put(endpoint, "changing/c.parquet", parquet(["a", "b", "c"]))
    reading = open_corpus(f"s3://{BUCKET}/changing", metric="l2").read_batches(1)
    next(reading)
    put(endpoint, "changing/c.parquet", parquet(["a", "b", "c", "d"]))
    with pytest.raises(CorpusUnreadable, match=r"s3://corpora/changing/c\.parquet"):
        list(reading)


def test_the_address_may_name_endpoint_scheme_and_region(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = f"?endpoint_override={endpoint.removeprefix('http://')}&scheme=http&region=eu-west-1"
    assert read_ids(f"s3://{BUCKET}/one.parquet{options}") == ids_in("one.parquet")
    assert read_ids(f"s3://{BUCKET}/many/?.parquet{options}") == ids_in("many/a.parquet", "many/b.parquet")


def test_the_endpoint_of_s3_wins_over_that_of_all_services(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    environment.setenv("AWS_ENDPOINT_URL_S3", endpoint + "/")
    environment.setenv("AWS_REGION", "eu-west-1")
    assert read_ids(f"s3://{BUCKET}/one.parquet") == ids_in("one.parquet")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://corpora/nope.parquet", ["no such file or folder"]),
        ("s3://corpora/nope/", ["no such file or folder"]),
        ("s3://corpora/nope/*.parquet", ["no file matches"]),
        ("s3://corpora/many/*.orc", ["no file matches"]),
        ("s3://no-such-bucket/one.parquet", ["no bucket 'no-such-bucket'"]),
        ("s3://no-such-bucket", ["no bucket 'no-such-bucket'"]),
        ("s3://no-such-bucket/*.parquet", ["no bucket 'no-such-bucket'"]),
        ("s3://corpora/broken.parquet", ["s3://corpora/broken.parquet", "whole"]),
        ("s3://", ["s3://bucket/key"]),
        ("s3:///one.parquet", ["s3://bucket/key"]),
        ("s3://*/one.parquet", ["no bucket '*'"]),
    ],
)
def test_what_is_not_there_or_damaged_is_refused_by_name(source: str, words: list[str]) -> None:
    with pytest.raises(CorpusUnreadable) as caught:
        read_ids(source)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_parquet_and_bad_rows_are_refused_as_on_a_disk(endpoint: str) -> None:
    put(endpoint, "texts/a.txt", b"")
    with pytest.raises(CorpusUnreadable, match=r"no \*\.parquet file in s3://corpora/texts"):
        read_ids(f"s3://{BUCKET}/texts")
    put(endpoint, "twice/a.parquet", parquet(["a"]))
    put(endpoint, "twice/b.parquet", parquet(["b", "a"]))
    with pytest.raises(BadRow, match=r"row 2 of b\.parquet \(id 'a'\): row 0 of a\.parquet"):
        read_ids(f"s3://{BUCKET}/twice")
    put(endpoint, "none/a.parquet", parquet(["a"])[:0])
    with pytest.raises(CorpusError):
        read_ids(f"s3://{BUCKET}/none")


def test_a_bucket_that_refuses_access_is_told_with_the_cause(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    for source in ("one.parquet", "many", "many/*.parquet"):
        with pytest.raises(CorpusUnreadable, match=r"ACCESS_DENIED.*credentials") as caught:
            read_ids(f"s3://{BUCKET}/{source}")
        assert isinstance(caught.value.__cause__, OSError)


def test_credentials_in_the_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(CorpusUnreadable, match="AWS_ACCESS_KEY_ID") as caught:
        read_ids("s3://key:hunter2@corpora/one.parquet")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "https://no-such-host.invalid", "127.0.0.1:9"])
def test_an_endpoint_that_is_not_there_fails_within_seconds(environment: pytest.MonkeyPatch, address: str) -> None:
    environment.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(CorpusUnreadable, match=r"s3://corpora/one\.parquet.*AWS_ENDPOINT_URL") as caught:
        read_ids(f"s3://{BUCKET}/one.parquet")
    assert isinstance(caught.value.__cause__, OSError)


def test_an_endpoint_that_stays_silent_fails_within_seconds(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(stores, "S3_REQUEST_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(CorpusUnreadable, match="AWS_ENDPOINT_URL"):
            read_ids(f"s3://{BUCKET}/one.parquet")


def test_a_server_that_goes_away_while_it_is_read_is_told(environment: pytest.MonkeyPatch) -> None:
    with s3.serving() as endpoint:
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        put(endpoint, "gone/a.parquet", parquet(["a"]))
        put(endpoint, "gone/b.parquet", parquet(["b"]))
        reading = open_corpus(f"s3://{BUCKET}/gone", metric="l2").read_batches(1)
        next(reading)
    with pytest.raises(CorpusUnreadable, match="s3://corpora/gone"):
        list(reading)
