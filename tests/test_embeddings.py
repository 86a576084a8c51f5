"""Vectors for whoever speaks OpenAI's words or TEI's: the same that the encoder makes, told truly, refused clearly."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import service
from service import Corpus, Service
from tiny_bert import MAX_TOKENS, write_json, write_tiny_bert

from vecsvc import encoders
from vecsvc.client import AsyncClient, Client
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.errors import InvalidRequest, UnknownModel

TEXTS = ["red cat", "list the files of a folder", "music river mountain", "naïve café, 東京"]
LONG = "red cat " * MAX_TOKENS
PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def tiny() -> Iterator[OnnxEncoder]:
    encoder = open_encoder(service.encoder_folder())
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def one() -> Iterator[Service]:
    """One index, and so one encoder."""
    with service.running(service.index("texts"), max_embed_texts=8, max_embed_chars=2000) as running:
        yield running


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with prompts, whose vectors are not of unit length."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("encoders") / "prompted", dim=16, seed=8)
    write_json(folder / "config_sentence_transformers.json", {"prompts": PROMPTS})
    modules = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [module for module in modules if not module["type"].endswith("Normalize")])
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, prompted: Path) -> Iterator[Service]:
    """Two indexes of one encoder, one of another, one of none."""
    out = tmp_path_factory.mktemp("several")
    words = [{"text": f"red cat {i}"} for i in range(5)]
    for name, encoder in (("docs", service.encoder_folder()), ("news", service.encoder_folder()), ("other", prompted)):
        corpus = Corpus(list(range(5)), service.vectors(5, seed=1), words, "ip")
        service.build(corpus, out, name, kind="exact", metric="ip", encoder=str(encoder))
    service.build(Corpus(list(range(5)), service.vectors(5, seed=1), [], "ip"), out, "bare", kind="exact", metric="ip")
    with service.running(out) as running:
        yield running


def openai_vectors(running: Service, texts: Any, model: str = "default", **more: Any) -> np.ndarray:
    reply = running.post("/v1/embeddings", {"input": texts, "model": model, **more})
    assert reply.status == 200, reply
    return np.array([one["embedding"] for one in reply.json()["data"]], dtype=np.float32)


def tei_vectors(running: Service, texts: Any, path: str = "/embed", **more: Any) -> np.ndarray:
    reply = running.post(path, {"inputs": texts, **more})
    assert reply.status == 200, reply
    return np.array(reply.json(), dtype=np.float32)


# -------------------------------------------------------------------------------------- the openai client


@pytest.fixture(scope="module")
def openai_client(one: Service) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_client_gets_the_vectors_of_the_encoder(openai_client: Any, tiny: OnnxEncoder, how: Any) -> None:
    answer = openai_client.embeddings.create(model="default", input=TEXTS, user="somebody", dimensions=8, **how)
    assert answer.object == "list" and answer.model == "tiny"
    assert [(one.object, one.index) for one in answer.data] == [("embedding", i) for i in range(len(TEXTS))]
    rows = [one.embedding for one in answer.data]
    if how == {"encoding_format": "base64"}:  # who asks for it by name gets it as it is
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    assert np.allclose(np.array(rows, np.float32), tiny.encode(TEXTS, "query"), atol=1e-6)


def test_the_openai_client_lists_what_model_may_be(openai_client: Any, tiny: OnnxEncoder) -> None:
    listed = list(openai_client.models.list())
    assert [one.id for one in listed] == ["texts", "tiny", "default"]
    assert {(one.object, one.encoder, one.dimensions, one.max_tokens) for one in listed} == {
        ("model", "tiny", 8, tiny.spec.max_tokens)
    }
    assert [openai_client.models.retrieve(one.id) for one in listed] == listed
    with pytest.raises(pytest.importorskip("openai").NotFoundError, match="no model 'other'; there are: texts, tiny"):
        openai_client.models.retrieve("other")
    for one in listed:
        assert openai_client.embeddings.create(model=one.id, input="red").model == "tiny"


def test_base64_is_exactly_the_numbers(openai_client: Any) -> None:
    numbers = openai_client.embeddings.create(model="default", input=TEXTS[0], encoding_format="float").data[0]
    encoded = openai_client.embeddings.create(model="default", input=TEXTS[0], encoding_format="base64").data[0]
    raw = np.frombuffer(base64.b64decode(encoded.embedding), dtype="<f4")
    assert np.array_equal(raw, np.array(numbers.embedding, np.float32))


def test_usage_counts_what_the_model_read(openai_client: Any, tiny: OnnxEncoder) -> None:
    usage = openai_client.embeddings.create(model="default", input=[*TEXTS, LONG]).usage
    expected = sum(len(tokens) for tokens in tiny.split(TEXTS)) + MAX_TOKENS
    assert usage.prompt_tokens == usage.total_tokens == expected


def test_the_openai_client_understands_our_refusals(openai_client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError) as unknown:
        openai_client.embeddings.create(model="text-embedding-3-small", input="red")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "no model 'text-embedding-3-small'; there are: texts, tiny" in unknown.value.message
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions must be 8, got 4") as wrong:
        openai_client.embeddings.create(model="default", input="red", dimensions=4)
    assert (wrong.value.type, wrong.value.param) == ("invalid_request_error", "dimensions")


def test_the_openai_client_asks_again_where_too_much_is_asked_at_once() -> None:
    openai = pytest.importorskip("openai")
    with service.running(service.index("texts"), max_buffered_bytes=100_000) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        with client, pytest.raises(openai.RateLimitError) as refused:
            client.embeddings.create(model="default", input="red " * 30_000)
        assert refused.value.type == "rate_limit_error"
        assert refused.value.response.headers["Retry-After"] == "1"


# ------------------------------------------------------------------------------------------ what they mean


@pytest.mark.parametrize("model", ["default", "texts", "tiny"])
def test_one_encoder_is_named_by_its_index_by_itself_or_as_the_default(one: Service, model: str) -> None:
    assert openai_vectors(one, "red cat", model).shape == (1, 8)


def test_a_vector_from_here_finds_what_its_text_finds(one: Service) -> None:
    [vector] = openai_vectors(one, "red cat")
    by_text = one.search(text="red cat", k=20)["results"]
    by_vector = one.search(vector=vector.tolist(), k=20)["results"]
    assert [hit["id"] for hit in by_vector] == [hit["id"] for hit in by_text]


def test_a_batch_is_its_singles_in_both_shapes(one: Service, tiny: OnnxEncoder) -> None:
    expected = tiny.encode(TEXTS, "query")
    for rows in (
        openai_vectors(one, TEXTS),
        np.concatenate([openai_vectors(one, text) for text in TEXTS]),
        tei_vectors(one, TEXTS),
        np.concatenate([tei_vectors(one, [text]) for text in TEXTS]),
        tei_vectors(one, TEXTS, "/indexes/texts/embed"),
    ):
        assert np.allclose(rows, expected, atol=1e-5)


def test_a_long_text_is_cut_and_the_answer_says_so(one: Service) -> None:
    assert one.post("/v1/embeddings", {"input": TEXTS, "model": "tiny"}).headers["x-truncated"] == "0"
    for reply in (
        one.post("/v1/embeddings", {"input": ["red", LONG, LONG], "model": "tiny"}),
        one.post("/embed", {"inputs": ["red", LONG, LONG], "truncate": True}),
    ):
        assert reply.status == 200 and reply.headers["x-truncated"] == "2"
    assert np.array_equal(openai_vectors(one, LONG), openai_vectors(one, LONG + "and so on"))


def test_a_megabyte_of_text_is_cut_as_well() -> None:
    with service.running(service.index("texts")) as running:
        reply = running.post("/v1/embeddings", {"input": ["x" * (1 << 20), "red"], "model": "tiny"})
        assert reply.status == 200 and reply.headers["x-truncated"] == "1"
        reply = running.post("/v1/embeddings", {"input": "x" * (1 + (1 << 20)), "model": "tiny"})
        assert reply.status == 422 and "1048577 characters" in reply.json()["error"]["message"]


def test_tei_refuses_to_cut_where_it_is_not_told_to(one: Service) -> None:
    for question in ({}, {"truncate": False}, {"truncate": None}):
        reply = one.post("/embed", {"inputs": ["red", LONG], **question})
        error = reply.json()
        assert reply.status == 413 and list(error) == ["error", "error_type"] and error["error_type"] == "Validation"
        assert f"has more than the {MAX_TOKENS} tokens that encoder 'tiny' reads" in error["error"]


def test_roles_have_their_prompts_in_both_shapes(several: Service, prompted: Path) -> None:
    encoder = open_encoder(prompted)
    query, passage = (encoder.encode(TEXTS, role) for role in ("query", "passage"))
    encoder.close()
    assert not np.allclose(query, passage, atol=0.01)
    for role, expected in (({}, query), ({"input_type": "query"}, query), ({"input_type": "passage"}, passage)):
        assert np.allclose(openai_vectors(several, TEXTS, "other", **role), expected, atol=1e-5)
    for name, expected in ((None, query), ("query", query), ("passage", passage), ("document", passage)):
        rows = tei_vectors(several, TEXTS, "/indexes/other/embed", prompt_name=name, normalize=False)
        assert np.allclose(rows, expected, atol=1e-5)


def test_tei_normalises_unless_it_is_told_not_to(several: Service, one: Service) -> None:
    raw = tei_vectors(several, TEXTS, "/indexes/other/embed", normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01
    unit = tei_vectors(several, TEXTS, "/indexes/other/embed")
    assert np.allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    # OpenAI's shape gives what the index was made of, so that it can be searched by.
    assert np.allclose(openai_vectors(several, TEXTS, "other"), raw, atol=1e-5)
    reply = one.post("/embed", {"inputs": TEXTS, "normalize": False})
    assert reply.status == 422 and "encoder 'tiny' gives vectors of unit length only" in reply.json()["error"]


def test_several_encoders_are_told_apart_by_index_or_by_name(several: Service) -> None:
    dims = {"docs": 8, "news": 8, "tiny": 8, "other": 16, "prompted": 16}
    assert {model: openai_vectors(several, "red", model).shape[1] for model in dims} == dims
    listed = several.get("/v1/models").json()["data"]
    assert {one["id"]: one["dimensions"] for one in listed} == dims
    for question in ({"input": "red", "model": "default"}, {"input": "red", "model": "bare"}):
        reply = several.post("/v1/embeddings", question)
        assert reply.status == 404 and reply.json()["error"]["code"] == "model_not_found"
        assert "docs" in reply.json()["error"]["message"] and "other" in reply.json()["error"]["message"]
    assert several.post("/embed", {"inputs": "red"}).status == 404
    reply = several.post("/indexes/bare/embed", {"inputs": "red"})
    assert reply.status == 422 and "index 'bare' has no encoder" in reply.json()["error"]
    assert several.post("/indexes/none/embed", {"inputs": "red"}).status == 404


def test_where_no_index_has_an_encoder_that_is_what_is_said() -> None:
    with service.running(service.index("squared")) as running:
        reply = running.post("/v1/embeddings", {"input": "red", "model": "default"})
        assert reply.status == 404 and "build one with --encoder" in reply.json()["error"]["message"]
        assert not any("embed" in path for path in running.get("/openapi.json").json()["paths"])
        assert running.get("/v1/models").json() == {"object": "list", "data": []}


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("question", "param", "message"),
    [
        ({"input": [], "model": "tiny"}, "input", "input has 0 texts, expected 1 to 8"),
        ({"input": ["x"] * 9, "model": "tiny"}, "input", "input has 9 texts, expected 1 to 8"),
        ({"input": "", "model": "tiny"}, "input", "input is empty"),
        ({"input": ["red", " \n\t"], "model": "tiny"}, "input", "input[1] is empty"),
        (
            {"input": "x" * 2001, "model": "tiny"},
            "input",
            "input has 2001 characters, the limit max_embed_chars is 2000",
        ),
        ({"input": [1, 2], "model": "tiny"}, "input", "input[0] must be a text, got token ids"),
        ({"input": [[1, 2]], "model": "tiny"}, "input", "check_embedding_ctx_length=False"),
        ({"input": [["red"], "fox"], "model": "tiny"}, "input", 'input[0] must be a text, got ["red"]'),
        ({"input": [None], "model": "tiny"}, "input", "input[0] must be a text, got null"),
        ({"input": [True], "model": "tiny"}, "input", "input[0] must be a text, got true"),
        ({"input": {"text": "red"}, "model": "tiny"}, "input", "$.input: Expected `str | array`, got `object`"),
        ({"model": "tiny"}, None, "missing required field `input`"),
        ({"input": "red"}, None, "missing required field `model`"),
        ({"input": "red", "model": 5}, "model", "$.model: Expected `str`, got `int`; the value is 5"),
        ({"input": "red", "model": "tiny", "encoding_format": "hex"}, "encoding_format", "known are: float, base64;"),
        ({"input": "red", "model": "tiny", "dimensions": 7}, "dimensions", "dimensions must be 8, got 7"),
        ({"input": "red", "model": "tiny", "input_type": "document"}, "input_type", 'the value is "document"'),
        ({"input": "red", "model": "tiny", "task": "x"}, None, "unknown field `task`"),
    ],
)
def test_a_wrong_question_is_422_in_openai_s_shape_and_says_what_would_be_right(
    one: Service, question: Any, param: str | None, message: str
) -> None:
    reply = one.post("/v1/embeddings", question)
    error = reply.json()["error"]
    assert reply.status == 422 and list(error) == ["message", "type", "param", "code"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"inputs": []}, "inputs has 0 texts, expected 1 to 8"),
        ({"inputs": [[1, 2]]}, "inputs[0] must be a text, got token ids"),
        ({"inputs": " "}, "inputs is empty"),
        ({"inputs": "red", "prompt_name": "summary"}, "prompt_name must be one of query, passage, document"),
        ({"inputs": "red", "truncation_direction": "Left"}, "truncation_direction must be right"),
        ({"inputs": "red", "dimensions": 7}, "dimensions must be 8, got 7"),
        ({"inputs": "red", "normalize": None}, "$.normalize"),
        ({"input": "red"}, "unknown field `input`"),
    ],
)
def test_a_wrong_question_is_422_in_tei_s_shape(one: Service, question: Any, message: str) -> None:
    for path in ("/embed", "/indexes/texts/embed"):
        reply = one.post(path, question)
        error = reply.json()
        assert reply.status == 422 and list(error) == ["error", "error_type"]
        assert message in error["error"] and error["error_type"] == "Validation"


def test_every_error_has_the_shape_of_its_path(one: Service) -> None:
    json_type = {"Content-Type": "application/json"}
    for path in ("/v1/embeddings", "/embed", "/indexes/texts/embed"):
        replies = [
            one.post(path, b"{"),
            one.post(path, b'{"input": "\\ud800", "inputs": "\\ud800", "model": "tiny"}'),
            one.ask("GET", path),
            one.ask("POST", path, b"x", {"Content-Type": "text/plain"}),
            one.ask("POST", path, b"x" * 32, {"Content-Type": "application/octet-stream"}),
            one.ask("POST", f"{path}?x=1", b"{}", json_type),
            one.ask("POST", path, b"{}", {**json_type, "Expect": "tea"}),
        ]
        assert [reply.status for reply in replies] == [400, 400, 405, 415, 415, 422, 417]
        for reply in replies:
            if path == "/v1/embeddings":
                assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
            else:
                assert list(reply.json()) == ["error", "error_type"]


@pytest.mark.parametrize("text", ["🦀🦀🦀", "\x00", "a\x00b", "\x01\x02 \x1f", "\u202e right to left", "e\u0301" * 50])
def test_odd_texts_have_vectors_and_leave_the_others_alone(one: Service, text: str) -> None:
    together = openai_vectors(one, ["red cat", text, "blue house"])
    assert np.isfinite(together).all()
    alone = np.concatenate([openai_vectors(one, "red cat"), openai_vectors(one, "blue house")])
    assert np.allclose(together[[0, 2]], alone, atol=1e-5)


def test_an_answer_that_would_fill_the_memory_is_refused_beforehand() -> None:
    from vecsvc.schemas_embed import EmbedRequest, check_encoder

    class Spec:
        name, dim, normalize = "wide", 16_384, True

    check_encoder(EmbedRequest(texts=["x"] * 1000, base64=True), Spec)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="send fewer texts at a time, or ask for base64"):
        check_encoder(EmbedRequest(texts=["x"] * 1000), Spec)  # type: ignore[arg-type]


def test_the_deadline_of_embeddings_is_a_setting_of_its_own() -> None:
    prelude = (
        "import time, vecsvc.encoders.onnx as onnx\n"
        "split, run, slow = onnx.OnnxEncoder.split, onnx.OnnxEncoder.run, []\n"
        "def watched(self, texts, role='query'):\n"
        "    if 'slow' in texts: slow.append(1)\n"
        "    return split(self, texts, role)\n"
        "def slowed(self, tokens):\n"
        "    if slow: time.sleep(1.0)\n"
        "    return run(self, tokens)\n"
        "onnx.OnnxEncoder.split, onnx.OnnxEncoder.run = watched, slowed"
    )
    with service.running(service.index("texts"), prelude, embed_timeout_ms=100) as running:
        reply = running.post("/v1/embeddings", {"input": ["slow", "fox"], "model": "tiny"})
        assert reply.status == 504 and reply.json()["error"]["type"] == "server_error"


# ------------------------------------------------------------------------------- what it says of itself


def test_metrics_count_tokens_and_what_was_cut(one: Service, tiny: OnnxEncoder) -> None:
    before = one.metric("vecsvc_truncated_texts_total", encoder="tiny"), encoded_tokens(one)
    openai_vectors(
        one, ["red cat by the river", LONG + " water"]
    )  # asked by no other test: nothing is remembered of them
    after = one.metric("vecsvc_truncated_texts_total", encoder="tiny"), encoded_tokens(one)
    tokens = len(tiny.split(["red cat by the river"])[0]) + MAX_TOKENS
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, tokens]


def encoded_tokens(service: Service) -> float:
    """In either lane: which one a request takes is decided by what runs were measured to take."""
    return sum(
        service.metric("vecsvc_encoder_tokens_total", encoder="tiny", lane=lane) for lane in ("interactive", "bulk")
    )


def test_the_answer_says_where_the_time_went(one: Service) -> None:
    timing = one.post("/embed", {"inputs": "red"}).headers["server-timing"]
    spans = dict(span.split(";dur=") for span in timing.split(", "))
    assert list(spans) == ["read", "embed", "answer"] and all(float(ms) >= 0 for ms in spans.values())


# ------------------------------------------------------------------------------------------- our own client


def test_our_client_embeds(one: Service, tiny: OnnxEncoder) -> None:
    with Client(one.url) as client:
        made = client.embed([*TEXTS, LONG])
        assert (made.model, made.truncated, made.vectors.dtype) == ("tiny", 1, np.float32)
        assert made.tokens == sum(map(len, tiny.split([*TEXTS, LONG])))
        assert np.allclose(made.vectors, tiny.encode([*TEXTS, LONG], "query"), atol=1e-6)
        again = client.embed(TEXTS, model="texts", role="passage").vectors  # in a batch of another shape, and rounding
        assert np.allclose(again, made.vectors[:-1], atol=1e-6)
        with pytest.raises(UnknownModel, match="no model 'gpt'; there are: texts, tiny"):
            client.embed(TEXTS, model="gpt")
        with pytest.raises(InvalidRequest, match="input has 0 texts"):
            client.embed([])
        with pytest.raises(InvalidRequest, match="must be a list of texts"):
            client.embed("red cat")


async def _embed(url: str) -> tuple[np.ndarray, str]:
    async with AsyncClient(url) as client:
        made = await client.embed(TEXTS)
        with pytest.raises(UnknownModel, match="no model 'gpt'"):
            await client.embed(TEXTS, model="gpt")
        return made.vectors, made.model


def test_our_async_client_embeds(one: Service, tiny: OnnxEncoder) -> None:
    import asyncio

    vectors, model = asyncio.run(_embed(one.url))
    assert model == "tiny" and np.allclose(vectors, tiny.encode(TEXTS, "query"), atol=1e-6)


# ------------------------------------------------------------------------------------ the default encoder


def test_the_default_encoder_can_be_named_at_serving_time(tmp_path: Path) -> None:
    shutil.copytree(service.encoder_folder(), tmp_path / "default")
    prelude = f"import pathlib, vecsvc.encoders as e; e.DEFAULT_FOLDER = pathlib.Path({str(tmp_path / 'default')!r})"
    with service.running(service.index("texts"), prelude, encoder="default") as running:
        assert running.post("/v1/embeddings", {"input": "red", "model": "default"}).json()["model"] == "default"


def test_a_missing_default_encoder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "DEFAULT_FOLDER", tmp_path / "none")
    with pytest.raises(encoders.ConfigError, match=r"no default encoder in .*none: reinstall vecsvc, or name one with"):
        encoders.default_encoder()
    assert encoders.encoder_path("./default") == Path("default"), "a folder of that name is still reached"
