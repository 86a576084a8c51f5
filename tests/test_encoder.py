"""Texts become the vectors that the files of an encoder say, and broken files are refused by name."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_bert import MAX_TOKENS, tiny_config, tiny_tokenizer, tiny_weights, vocabulary, write_json, write_tiny_bert

from index_builders.bert_graph import bert_graph
from vecsvc.encoders import folder as files
from vecsvc.encoders import onnx as module
from vecsvc.encoders.base import CANARY_TEXTS, check_canaries, unit_length
from vecsvc.encoders.folder import encoder_files
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.errors import (
    BackendMissing,
    ConfigError,
    EncoderError,
    EncoderMismatch,
    InvalidParameter,
    InvalidRequest,
)
from vecsvc.onnx_session import OnnxSession, SessionSettings
from vecsvc.tokenizer import TextTokenizer

DIM = 32
TEXTS = ("vector search", "the quick brown fox jumps over the lazy dog", "x", "", "How do I list files? " * 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[OnnxEncoder]:
    opened = open_encoder(folder)
    yield opened
    opened.close()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """An encoder folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def bert(ids: list[int], weights: dict[str, NDArray[np.float32]], config: dict[str, Any]) -> NDArray[np.float64]:
    """BERT for one text, as the paper has it: hidden states (t, dim), in float64, head by head."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    act: Callable[[float], float] = {
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_new": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: max(v, 0.0),
    }[config["hidden_act"]]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    size = config["hidden_size"] // config["num_attention_heads"]
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        query, key, value = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        mixed = np.empty_like(x)
        for head in range(config["num_attention_heads"]):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
            mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ value[:, part]
        x = norm(linear(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        wide = np.vectorize(act)(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(wide, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    return x


def reference(folder: Path, texts: tuple[str, ...], pooling: str = "mean") -> NDArray[np.float64]:
    tokenizer = TextTokenizer(folder / "tokenizer.json", MAX_TOKENS)
    hidden = [bert(tokens.ids, tiny_weights(), tiny_config()) for tokens in tokenizer.split(texts)]
    pools = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "max": lambda h: h.max(0)}
    return np.stack([pools[pooling](h) for h in hidden])


# -------------------------------------------------------------------------------------------- the vectors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("spelling", ["flags", "name"])
def test_vectors_agree_with_a_bert_written_in_numpy(copy: Path, pooling: str, normalize: bool, spelling: str) -> None:
    flags: dict[str, Any] = {f"pooling_mode_{p}_tokens": p == pooling for p in ("mean", "max")}
    flags["pooling_mode_cls_token"] = pooling == "cls"
    write_json(copy / "1_Pooling/config.json", flags if spelling == "flags" else {"pooling_mode": pooling})
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    write_json(copy / "modules.json", [{"type": f"sentence_transformers.models.{s}"} for s in steps])
    encoder = open_encoder(copy, num_threads=1)
    assert (encoder.spec.pooling, encoder.spec.normalize, encoder.spec.dim) == (pooling, normalize, DIM)
    expected = reference(copy, TEXTS, pooling)
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for text, vector in zip(TEXTS, expected, strict=True):  # without padding other ways are taken
        alone = encoder.encode([text])
        assert alone.dtype == np.float32
        np.testing.assert_allclose(alone[0], vector, atol=2e-5)


def test_without_settings_the_mean_is_taken_at_unit_length_and_the_tokenizer_cuts(copy: Path) -> None:
    for name in files.CONFIGS:
        (copy / name).unlink()
    spec = open_encoder(copy, num_threads=1).spec
    assert (spec.pooling, spec.normalize, spec.max_tokens, spec.prompts) == ("mean", True, 12, {})


def test_batch_equals_single_and_keeps_the_order(encoder: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    words = [word for word in vocabulary() if word.isalpha()]
    texts = [" ".join(random.choice(words, random.integers(0, 30))) for _ in range(200)]
    singles = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), singles, atol=1e-5)
    monkeypatch.setattr(encoder, "_batch_tokens", 50)
    monkeypatch.setattr(module, "WINDOW_TEXTS", 64)
    np.testing.assert_allclose(encoder.encode(tuple(texts)), singles, atol=1e-5)


def test_no_run_of_the_model_is_larger_than_its_bound(encoder: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def run(inputs: dict[str, NDArray[Any]], outputs: list[str]) -> list[NDArray[Any]]:
        sizes.append(inputs["input_ids"].shape)
        return original(inputs, outputs)

    original = encoder._session.run
    monkeypatch.setattr(encoder._session, "run", run)
    monkeypatch.setattr(encoder, "_batch_tokens", 48)
    encoder.encode(["fox " * (i % 40) for i in range(100)])
    assert sum(n for n, _ in sizes) == 100
    assert max(n * t for n, t in sizes) == 48
    monkeypatch.setattr(encoder, "_batch_tokens", 1)
    sizes.clear()
    encoder.encode(["fox", "fox fox"])
    assert sizes == [(1, 4), (1, 3)]  # a text beyond the bound goes alone


def test_padding_does_not_change_a_vector(encoder: OnnxEncoder) -> None:
    alone = encoder.encode(["vector search"])
    padded = encoder.encode(["vector search", "fox " * 100])
    np.testing.assert_allclose(padded[:1], alone, atol=1e-5)


def test_text_beyond_max_tokens_is_cut(encoder: OnnxEncoder) -> None:
    assert encoder.spec.max_tokens == MAX_TOKENS
    room = MAX_TOKENS - 2
    cut, whole, shorter = encoder.encode(["fox " * 500 + "dog", "fox " * room, "fox " * (room - 1)])
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    assert np.abs(cut - shorter).max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-22, 1e-21, 1e-18, 1.0, 1e18, 1e30])
def test_vectors_of_any_scale_become_unit_length_alone_and_together(scale: float) -> None:
    vectors = np.random.default_rng(7).standard_normal((5, DIM)).astype(np.float32)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if scale else np.zeros_like(vectors)
    scaled = vectors * np.float32(scale)
    alone = np.concatenate([unit_length(scaled[row : row + 1]) for row in range(len(scaled))])
    for found in (unit_length(scaled), alone):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_vectors_have_unit_length_and_none_is_missing(encoder: OnnxEncoder) -> None:
    vectors = encoder.encode(["", " ", "\x00", "東京", "😀", *TEXTS], "passage")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert encoder.encode([]).shape == (0, DIM)
    assert encoder.encode([]).dtype == np.float32


def test_prompts_are_put_before_the_texts_of_their_role(copy: Path, encoder: OnnxEncoder) -> None:
    write_json(copy / files.PROMPTS, {"prompts": {"query": "query: ", "document": "passage ", "other": "no "}})
    prompted = open_encoder(copy, num_threads=1)
    assert prompted.spec.prompts == {"query": "query: ", "passage": "passage "}
    np.testing.assert_allclose(prompted.encode(["fox"], "query"), encoder.encode(["query: fox"]), atol=1e-6)
    np.testing.assert_allclose(prompted.encode(["fox"], "passage"), encoder.encode(["passage fox"]), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"prompts": {"query": "", "passage": "p "}}, {"passage": "p "}),
        ({"prompts": {"passage": "p ", "document": "d "}}, {"passage": "d "}),
        ({"prompts": {"query": None, "x": "x "}, "default_prompt_name": "x"}, {"passage": "x "}),
        ({"prompts": {"x": "x "}}, {}),
        ({"__version__": {"pytorch": "1.8.1"}}, {}),
    ],
)
def test_prompt_names_are_those_of_sentence_transformers(
    copy: Path, config: dict[str, Any], expected: dict[str, str]
) -> None:
    write_json(copy / files.PROMPTS, config)
    assert open_encoder(copy, num_threads=1).spec.prompts == expected


def test_threads_get_what_one_thread_gets(encoder: OnnxEncoder) -> None:
    batches = [[f"{word} fox {i}" for word in ("red", "green", "blue")] for i in range(48)]
    expected = [encoder.encode(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for found, serial in zip(pool.map(encoder.encode, batches), expected, strict=True):
            np.testing.assert_allclose(found, serial, atol=1e-6)


def test_bad_arguments_are_refused_by_name(encoder: OnnxEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_TEXTS", 2)
    with pytest.raises(InvalidRequest, match="text 3 has a lone surrogate"):
        encoder.encode(["fox", "dog", "cat", "\ud800"])
    with pytest.raises(InvalidRequest, match="list of texts"):
        encoder.encode("fox")
    with pytest.raises(InvalidParameter, match="role must be one of query, passage, got 'document'"):
        encoder.encode(["fox"], "document")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="num_threads must be between 0 and 1024, got -1"):
        open_encoder(folder, num_threads=-1)


def test_a_closed_encoder_says_so(folder: Path) -> None:
    encoder = open_encoder(folder, num_threads=1)
    encoder.close()
    encoder.close()
    with pytest.raises(EncoderError, match=r"model\.onnx: the model was closed"):
        encoder.encode(["fox"])


# -------------------------------------------------------------------------- which encoder it is, in numbers


def test_fingerprint_is_that_of_the_files_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere" / "other name"
    for file in encoder_files(folder):
        target = copied / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (copied / "README.md").write_text("no part of the encoder")
    first, second = open_encoder(folder).spec, open_encoder(copied, num_threads=1).spec
    assert (first.name, second.name) == ("tiny", "other name")
    assert open_encoder(folder, name="mine").spec.name == "mine"
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64
    again = write_tiny_bert(tmp_path / "again")
    assert open_encoder(again).spec.fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", *files.CONFIGS])
def test_one_changed_byte_in_any_file_changes_the_fingerprint(folder: Path, copy: Path, name: str) -> None:
    assert copy / name in encoder_files(copy)
    data = bytearray((copy / name).read_bytes())
    if name == "model.onnx":
        place = data.index(tiny_weights()["embeddings.word_embeddings.weight"].tobytes())
        data[place] ^= 1
    else:
        place = data.index(b" ")
        data[place : place + 1] = b"\n"
    (copy / name).write_bytes(data)
    assert open_encoder(copy).spec.fingerprint != open_encoder(folder).spec.fingerprint


def test_canaries_pass_for_itself_and_fail_for_another_by_both_names(encoder: OnnxEncoder, tmp_path: Path) -> None:
    built = encoder.encode(CANARY_TEXTS)
    check_canaries("serving", encoder.encode(CANARY_TEXTS), "built", built)
    other = open_encoder(write_tiny_bert(tmp_path / "other", seed=8))
    with pytest.raises(EncoderMismatch, match=r"'other' is not 'tiny'.*canary cosine"):
        check_canaries(other.spec.name, other.encode(CANARY_TEXTS), encoder.spec.name, built)
    wider = open_encoder(write_tiny_bert(tmp_path / "wider", dim=48))
    with pytest.raises(EncoderMismatch, match=r"'wider' has dim 48.*'tiny' of dim 32"):
        check_canaries(wider.spec.name, wider.encode(CANARY_TEXTS), encoder.spec.name, built)


# ------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", None, r"has no model\.onnx or onnx/model\.onnx"),
        ("model.onnx", b"", r"model\.onnx: no readable model"),
        ("model.onnx", b"no protobuf at all", r"model\.onnx: onnxruntime cannot open it"),
        ("tokenizer.json", None, r"tokenizer\.json: missing"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: is no tokenizer"),
        ("modules.json", b"{}", r"modules\.json: Expected `array`, got `object`"),
        ("modules.json", b'[{"path": ""}]', r"modules\.json: Object missing required field `type`"),
        ("modules.json", b'[{"type": "x.Dense"}]', r"modules\.json: Dense is not supported"),
        ("modules.json", b"\xff\xfe[]", r"modules\.json: "),
        ("1_Pooling/config.json", None, r"1_Pooling/config\.json: missing, though modules\.json"),
        ("1_Pooling/config.json", b"[1]", r"1_Pooling/config\.json: Expected `object`"),
        ("1_Pooling/config.json", b"{}", r"1_Pooling/config\.json: pooling must be one of mean, cls, max; got none"),
        ("1_Pooling/config.json", b'{"pooling_mode": "lasttoken"}', r"got lasttoken"),
        (
            "1_Pooling/config.json",
            b'{"pooling_mode_cls_token": true, "pooling_mode_mean_sqrt_len_tokens": true}',
            r"got cls_token and mean_sqrt_len_tokens",
        ),
        ("sentence_bert_config.json", b'{"max_seq_length": "many"}', r"sentence_bert_config\.json: Expected `int"),
        ("sentence_bert_config.json", b'{"max_seq_length": 0}', r"sentence_bert_config\.json: Expected `int` >= 1"),
        ("sentence_bert_config.json", b'{"max_seq_length": 2}', r"tokenizer\.json: max_tokens must be between 3"),
        ("sentence_bert_config.json", b'{"max_seq', r"sentence_bert_config\.json: Input data was truncated"),
        ("config_sentence_transformers.json", b'{"prompts": ["x"]}', r"config_sentence_transformers\.json: Expected"),
    ],
)
def test_a_broken_file_is_refused_by_name(copy: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(EncoderError, match=message):
        open_encoder(copy)


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no encoder folder .*nowhere"):
        open_encoder(tmp_path / "nowhere")


def test_excluded_prompts_are_refused(copy: Path) -> None:
    write_json(copy / files.PROMPTS, {"prompts": {"query": "q "}})
    write_json(copy / files.POOLING, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    with pytest.raises(EncoderError, match="include_prompt false is not supported"):
        open_encoder(copy)


def test_files_have_size_limits(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "MAX_ENCODER_BYTES", 1000)
        with pytest.raises(EncoderError, match="at most 1000 are read"):
            encoder_files(copy)
    monkeypatch.setattr(files, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(EncoderError, match=r"modules\.json: larger than 10 bytes"):
        open_encoder(copy)


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(copy: Path) -> None:
    weights = tiny_weights()
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:20]
    model = bert_graph(tiny_config() | {"vocab_size": 20}, weights)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    encoder = open_encoder(copy)
    with pytest.raises(EncoderError, match=r"model\.onnx: onnxruntime failed on input_ids \(1, 3\)"):
        encoder.encode(["fox"])


def test_a_model_that_gives_nan_is_refused(copy: Path) -> None:
    weights = tiny_weights()
    weights["embeddings.LayerNorm.bias"] = np.full(DIM, np.nan, dtype=np.float32)
    (copy / "model.onnx").write_bytes(bert_graph(tiny_config(), weights).SerializeToString())
    with pytest.raises(EncoderError, match=r"'copy': the model gave no finite numbers for "):
        open_encoder(copy).encode(["fox"])


# ------------------------------------------------------------------------------------- models of other makes


def pooled_model(*, inputs: tuple[str, ...] = ("input_ids",), external: str = "", kind: int = TensorProto.INT64) -> Any:
    """A model that gives the mean of the word vectors: one vector (n, 8) per text, and those of the words."""
    table = np.random.default_rng(7).standard_normal((len(vocabulary()), 8)).astype(np.float32)
    weight = numpy_helper.from_array(table, "table")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(table.nbytes))):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["token_embeddings"]),
            helper.make_node("ReduceMean", ["token_embeddings"], ["sentence_embedding"], axes=[1], keepdims=0),
        ],
        "pooled",
        [helper.make_tensor_value_info(name, kind, ["n", "t"]) for name in inputs],
        [
            helper.make_tensor_value_info("token_embeddings", TensorProto.FLOAT, ["n", "t", 8]),
            helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["n", 8]),
        ],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return (model, table) if external else model


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_a_model_that_pools_itself_is_not_pooled_again(copy: Path, kind: int) -> None:
    onnx.save(pooled_model(kind=kind), copy / "model.onnx")
    write_json(copy / "modules.json", [{"type": "Transformer"}, {"type": "Pooling"}, {"type": "Dense"}])
    encoder = open_encoder(copy)
    assert (encoder.spec.pooling, encoder.spec.dim, encoder.spec.normalize) == ("none", 8, False)
    table = numpy_helper.to_array(pooled_model().graph.initializer[0])
    ids = TextTokenizer(copy / "tokenizer.json").split(["vector search"])[0].ids
    np.testing.assert_allclose(encoder.encode(["vector search"]), table[ids].mean(0, keepdims=True), atol=1e-6)


def test_a_model_in_its_own_folder_is_found_with_its_weights(copy: Path, tmp_path: Path) -> None:
    (copy / "model.onnx").unlink()
    (copy / "onnx").mkdir()
    model, table = pooled_model(external="model.onnx_data")
    (copy / "onnx/model.onnx").write_bytes(model.SerializeToString())
    (copy / "onnx/model.onnx_data").write_bytes(table.tobytes())
    found = [file.relative_to(copy).as_posix() for file in encoder_files(copy)]
    assert found == ["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", *files.CONFIGS]
    before = open_encoder(copy).spec.fingerprint
    (copy / "onnx/model.onnx_data").write_bytes((table + 1).tobytes())
    assert open_encoder(copy).spec.fingerprint != before


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "sub/weights.bin", "a" * 200 + ".bin", ".hidden"])
def test_weights_that_do_not_lie_beside_the_model_are_refused(copy: Path, place: str) -> None:
    model, table = pooled_model(external=place)
    (copy.parent / "secret.bin").write_bytes(table.tobytes())
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        EncoderError, match=r"model\.onnx: has weights in '.*; they must lie in a file beside the model"
    ):
        open_encoder(copy)


@pytest.mark.parametrize("place", ["../secret.bin", "link.bin", "none.bin"])
def test_onnxruntime_itself_refuses_weights_outside_too(copy: Path, place: str) -> None:
    model, table = pooled_model(external=place)
    (copy.parent / "secret.bin").write_bytes(table.tobytes())
    (copy / "link.bin").symlink_to("../secret.bin")
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EncoderError, match=r"model\.onnx: onnxruntime cannot open it: .+"):
        OnnxSession(copy / "model.onnx")


def test_a_model_of_another_trade_is_refused_by_its_inputs_and_outputs(copy: Path) -> None:
    onnx.save(pooled_model(inputs=("input_ids", "pixel_values")), copy / "model.onnx")
    with pytest.raises(EncoderError, match=r"is no text encoder: its inputs are input_ids, pixel_values"):
        open_encoder(copy)
    model = pooled_model()
    model.graph.output[0].name = "a"
    model.graph.node.append(helper.make_node("ReduceMean", ["token_embeddings"], ["a"], axes=[2], keepdims=0))
    del model.graph.output[0].type.tensor_type.shape.dim[2]
    model.graph.node[1].output[0] = model.graph.output[1].name = "b"
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(EncoderError, match=r"its outputs are a, b; expected last_hidden_state"):
        open_encoder(copy)


# ----------------------------------------------------------------------------------------------- the backend


def test_missing_onnxruntime_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match=r"encoders need onnxruntime: pip install 'vecsvc\[cpu\]'"):
        open_encoder(folder)


def test_a_device_that_is_not_there_names_the_remedy(folder: Path) -> None:
    import onnxruntime

    with pytest.raises(BackendMissing, match=r"device 'tpu' is not in this onnxruntime, which has .*cpu: name one"):
        open_encoder(folder, device="tpu")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendMissing, match=r"device 'cuda' is not in .*pip install 'vecsvc\[gpu\]'"):
        open_encoder(folder, device="cuda")


def test_cuda_that_does_not_start_is_no_silent_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcudnn"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime warns, and goes on with the CPU
        with pytest.raises(BackendMissing, match="onnxruntime could not start CUDA"):
            open_encoder(folder, device="cuda")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "Failed to load libcudnn")


@pytest.mark.parametrize("spinning", [False, True])
def test_the_session_keeps_nothing_per_shape_and_spins_only_when_told_and_only_in_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spinning: bool
) -> None:
    import onnxruntime

    seen: list[Any] = []
    original = onnxruntime.InferenceSession

    def watch(path: str, options: Any, **kwargs: Any) -> Any:
        seen.append(options)
        return original(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    OnnxSession(folder / "model.onnx", SessionSettings(num_threads=3, spinning=spinning))
    [options] = seen
    assert options.intra_op_num_threads == 3
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_the_tokenizer_file_of_the_tests_is_as_awkward_as_real_ones() -> None:
    assert tiny_tokenizer().padding["length"] == 128
