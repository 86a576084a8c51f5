"""A Hugging Face folder becomes an encoder that computes what the original computes, or is refused by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import bert_family
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from test_encoder import bert
from tiny_bert import (
    MAX_TOKENS,
    POSITIONS,
    tiny_config,
    tiny_tokenizer,
    tiny_weights,
    vocabulary,
    write_json,
    write_tiny_bert,
    write_tiny_source,
)
from tokenizers import Tokenizer

from index_builders.bert_config import read_config
from index_builders.bert_graph import bert_graph, relative_buckets
from index_builders.encoder_import import ImportSettings, import_encoder, read_safetensors
from index_builders.onnx_graph import IR_VERSION, OPSET
from vecsvc import storage
from vecsvc.encoders.folder import CONFIGS, encoder_files
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import BackendMissing, ConfigError, EncoderError, InvalidParameter, StorageError
from vecsvc.tokenizer import TextTokenizer

TEXTS = (
    "vector search",
    "",
    "naïve café, 東京, 1e-3, <b>markup</b> & more",
    "How do I list the files of a folder? " * 3,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_source(tmp_path / "source")


def expected(folder: Path, weights: dict[str, NDArray[np.float32]], config: dict[str, Any]) -> NDArray[np.float64]:
    tokenizer = TextTokenizer(folder / "tokenizer.json", MAX_TOKENS)
    means = np.stack([bert(one.ids, weights, config).mean(0) for one in tokenizer.split(TEXTS)])
    unit: NDArray[np.float64] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def write_safetensors(file: Path, arrays: dict[str, tuple[str, NDArray[Any]]]) -> None:
    """By hand, because safetensors' NumPy writer knows no bfloat16."""
    header, start = {}, 0
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(a.tobytes() for _, a in arrays.values()))


# ------------------------------------------------------------------------------------------- converted


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_converted_bert_agrees_with_one_written_in_numpy(tmp_path: Path, prefix: str) -> None:
    source, out = write_tiny_source(tmp_path / "source", prefix=prefix), tmp_path / "deep" / "out"
    spec = import_encoder(source, out, ImportSettings(max_tokens=MAX_TOKENS))
    assert (spec.name, spec.dim, spec.pooling, spec.normalize, spec.max_tokens) == ("out", 32, "mean", True, MAX_TOKENS)
    encoder = open_encoder(out)
    assert encoder.spec == spec
    np.testing.assert_allclose(encoder.encode(TEXTS), expected(source, tiny_weights(), tiny_config()), atol=2e-5)


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_other_activations_agree_with_numpy(source: Path, tmp_path: Path, act: str) -> None:
    write_json(source / "config.json", tiny_config() | {"hidden_act": act})
    import_encoder(source, tmp_path / "out")
    config = tiny_config() | {"hidden_act": "gelu_new" if act.startswith("gelu") else act}
    found = open_encoder(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(found, expected(source, tiny_weights(), config), atol=2e-5)
    assert np.abs(found - expected(source, tiny_weights(), tiny_config())).max() > 1e-5


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_weights_are_widened(source: Path, tmp_path: Path, dtype: str) -> None:
    arrays, weights = {}, {}
    for name, array in tiny_weights().items():
        half = array.astype(np.float16) if dtype == "F16" else (array.view(np.uint32) >> 16).astype(np.uint16)
        arrays[name] = (dtype, half)
        wide = half.astype(np.float32) if dtype == "F16" else (half.astype(np.uint32) << 16).view(np.float32)
        weights[name] = wide.reshape(array.shape)
    arrays["embeddings.position_ids"] = ("I64", np.arange(POSITIONS)[None])
    write_safetensors(source / "model.safetensors", arrays)
    import_encoder(source, tmp_path / "out")
    found = open_encoder(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(found, expected(source, weights, tiny_config()), atol=2e-5)


def test_the_names_of_the_first_bert_are_known(source: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tiny_weights().items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file({**old, "pooler.dense.bias": np.zeros(32, dtype=np.float32)}, source / "model.safetensors")
    import_encoder(source, tmp_path / "out")
    found = open_encoder(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(found, expected(source, tiny_weights(), tiny_config()), atol=2e-5)


def test_the_graph_is_plain_onnx_with_free_axes_and_the_same_every_time() -> None:
    model = bert_graph(tiny_config(), tiny_weights())
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR_VERSION <= 10
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    [output] = model.graph.output
    assert output.name == "last_hidden_state"
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["batch", "sequence", 32]
    assert "LayerNormalization" in {node.op_type for node in model.graph.node}
    again = bert_graph(tiny_config(), dict(reversed(tiny_weights().items())))
    assert again.SerializeToString() == model.SerializeToString()


def test_import_is_the_same_encoder_as_the_one_made_at_once(source: Path, tmp_path: Path) -> None:
    spec = import_encoder(source, tmp_path / "out")
    assert import_encoder(source, tmp_path / "again").fingerprint == spec.fingerprint
    direct = open_encoder(write_tiny_bert(tmp_path / "direct"))
    np.testing.assert_allclose(open_encoder(tmp_path / "out").encode(TEXTS), direct.encode(TEXTS), atol=1e-6)


# ------------------------------------------------------------------------------------------------ copied


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
def test_an_onnx_model_is_copied_with_its_files_and_nothing_else(tmp_path: Path, place: str) -> None:
    source = write_tiny_bert(tmp_path / "source")
    (source / place).parent.mkdir(exist_ok=True)
    (source / "model.onnx").rename(source / place)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "onnx").mkdir(exist_ok=True)
    (source / "onnx/model_quantized.onnx").write_bytes(b"another one")
    spec = import_encoder(source, tmp_path / "out")
    copied = sorted(f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert copied == sorted([place, "tokenizer.json", *CONFIGS])
    assert (tmp_path / "out" / place).read_bytes() == (source / place).read_bytes()
    np.testing.assert_array_equal(open_encoder(tmp_path / "out").encode(TEXTS), open_encoder(source).encode(TEXTS))
    assert open_encoder(tmp_path / "out").spec == spec


def test_links_are_followed_so_that_a_hub_cache_can_be_imported(tmp_path: Path) -> None:
    blobs, snapshot = write_tiny_bert(tmp_path / "blobs"), tmp_path / "snapshots" / "abc"
    for file in encoder_files(blobs):
        link = snapshot / file.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    import_encoder(snapshot, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("asked", "stated", "settled"), [(256, 24, 24), (8, 24, 8), (16, None, 16), (256, None, POSITIONS)]
)
def test_the_smallest_length_wins_and_is_written_down(
    source: Path, tmp_path: Path, asked: int, stated: int | None, settled: int
) -> None:
    (source / "sentence_bert_config.json").unlink()
    if stated is not None:
        write_json(source / "sentence_bert_config.json", {"max_seq_length": stated, "do_lower_case": True})
    assert import_encoder(source, tmp_path / "out", ImportSettings(max_tokens=asked)).max_tokens == settled
    written = json.loads((tmp_path / "out/sentence_bert_config.json").read_text())
    assert written["max_seq_length"] == settled
    assert written.get("do_lower_case") == (None if stated is None else True)


def test_a_length_that_the_model_cannot_take_is_found_at_import(tmp_path: Path) -> None:
    source = write_tiny_bert(tmp_path / "source")
    (source / "sentence_bert_config.json").unlink()
    with pytest.raises(
        EncoderError, match=rf"max_tokens {POSITIONS + 1} is too long for the model: .*source/model\.onnx"
    ):
        import_encoder(source, tmp_path / "out", ImportSettings(max_tokens=POSITIONS + 1))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; bert, .* can be converted, others need an onnx/model\.onnx"),
        ({"model_type": None}, r"model_type is None"),
        ({"hidden_act": "silu"}, r"hidden_act must be one of gelu, .* got 'silu'"),
        ({"hidden_size": 48}, r"weight embeddings\.\S+ has shape \(.*\), the config says \(.*48\)"),
        ({"hidden_size": "wide"}, r"Expected `int`, got `str` - at `\$\.hidden_size`"),
        ({"num_attention_heads": 0}, r"Expected `int` >= 1 - at `\$\.num_attention_heads`"),
        ({"num_attention_heads": 3}, r"3 heads do not divide hidden_size 32"),
        ({"num_hidden_layers": 3}, r"the weights lack encoder\.layer\.2\.attention\.self\.query\.weight"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, and the weights have more; --layers 1 takes so many"),
        ({"position_embedding_type": "relative_key"}, r"absolute position embeddings"),
        ({"is_decoder": True}, r"only encoders"),
    ],
)
def test_another_architecture_is_refused_by_name(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_json(source / "config.json", tiny_config() | change)
    with pytest.raises(EncoderError, match=f"source: .*{message}"):
        import_encoder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json: missing; an encoder is made from model\.onnx and tokenizer\.json, or"),
        ("config.json", b"{", r"config\.json: Input data was truncated"),
        ("model.safetensors", None, r"model\.safetensors: missing"),
        ("model.safetensors", b"", r"model\.safetensors: is no safetensors file"),
        ("model.safetensors", b"\xff" * 64, r"model\.safetensors: is no safetensors file"),
        ("tokenizer.json", None, r"tokenizer\.json: missing"),
        ("tokenizer.json", b"[]", r"tokenizer\.json: is no tokenizer"),
        ("sentence_bert_config.json", b"[]", r"sentence_bert_config\.json: Expected `object`"),
        ("model.onnx", b"junk", r"the model is not valid ONNX"),
    ],
)
def test_a_broken_file_is_refused_by_name_and_leaves_nothing(
    source: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(content)
    with pytest.raises(EncoderError, match=message):
        import_encoder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_out_missing_source_and_bad_length_are_the_users_mistakes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out exists, and an encoder is never overwritten"):
        import_encoder(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no encoder folder .*nowhere"):
        import_encoder(tmp_path / "nowhere", tmp_path / "new")
    for bad in (0, 8193):
        with pytest.raises(InvalidParameter, match=f"max_tokens must be between 1 and 8192, got {bad}"):
            import_encoder(source, tmp_path / "new", ImportSettings(max_tokens=bad))


def test_a_tokenizer_for_another_vocabulary_is_found_at_import(source: Path, tmp_path: Path) -> None:
    larger = tiny_tokenizer()
    larger.add_special_tokens(["[NEW]"])
    larger.post_processor = None
    larger.add_tokens(["vector"])
    weights = {n: a[:30] if n == "embeddings.word_embeddings.weight" else a for n, a in tiny_weights().items()}
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, source / "model.safetensors")
    write_json(source / "config.json", tiny_config() | {"vocab_size": 30})
    larger.save(str(source / "tokenizer.json"))
    with pytest.raises(EncoderError, match=r"onnxruntime failed on input_ids"):
        import_encoder(source, tmp_path / "out")


@pytest.mark.parametrize("library", ["onnx", "safetensors"])
def test_a_missing_library_names_the_remedy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendMissing, match=rf"needs {library}: pip install 'vecsvc\[models\]'"):
        import_encoder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_import_that_dies_anywhere_leaves_no_encoder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[str] = []
    monkeypatch.setattr(storage, "failpoint", points.append)
    import_encoder(source, tmp_path / "whole")
    assert len(points) > 10
    for number in range(points.index("rename whole") + 1):
        left = iter(range(number))

        def fail(point: str, left: Any = left) -> None:
            if next(left, None) is None and not point.startswith("delete"):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage, "failpoint", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            import_encoder(source, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "whole"]


def test_weights_beyond_the_limit_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import index_builders.encoder_import
    import index_builders.onnx_graph

    for module in (index_builders.onnx_graph, index_builders.encoder_import):
        monkeypatch.setattr(module, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(EncoderError, match=r"model\.safetensors: has \d+ bytes, at most 1000 can be converted"):
        read_safetensors(source / "model.safetensors")
    with pytest.raises(EncoderError, match="the weights have more than 1000 bytes"):
        bert_graph(tiny_config(), tiny_weights())


# ------------------------------------------------------------------------------------------ the relatives


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("kind", list(bert_family.CONFIGS))
def test_every_family_agrees_with_one_written_in_numpy(kind: str, layers: int | None) -> None:
    weights = bert_family.family_weights(kind, 50)
    prefix = {"xlm-roberta": "roberta.", "camembert": "roberta."}.get(kind, f"{kind}.")
    model = bert_graph(bert_family.family_config(kind, 50), {prefix + n: a for n, a in weights.items()}, layers=layers)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    longest = bert_family.POSITIONS - bert_family.FIRST.get(kind, 0)
    random = np.random.default_rng(3)
    texts = [random.integers(2, 50, size=length).tolist() for length in (longest, 1, 11)]
    feed = {
        "input_ids": np.array([text + [1] * (longest - len(text)) for text in texts]),
        "attention_mask": np.array([[1] * len(text) + [0] * (longest - len(text)) for text in texts]),
        "token_type_ids": np.zeros((len(texts), longest), dtype=np.int64),
    }
    known = {port.name for port in session.get_inputs()}
    assert ("token_type_ids" in known) == (kind == "bert")
    [found] = session.run(None, {name: value for name, value in feed.items() if name in known})
    for row, text in zip(found, texts, strict=True):
        want = bert_family.forward(kind, text, weights, layers or bert_family.LAYERS)
        np.testing.assert_allclose(row[: len(text)], want, atol=1e-4)


def test_far_distances_share_the_buckets_of_mpnet() -> None:
    table = relative_buckets(300, 32)
    assert table.tolist() == [bert_family.bucket(distance) for distance in range(-299, 300)]
    assert table.min() == 0 and table.max() == 31


@pytest.mark.parametrize("kind", list(bert_family.CONFIGS))
def test_every_family_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(7)
    torch.set_num_threads(1)  # threads that wait for each other stand still where the machine is busy
    config = transformers.AutoConfig.for_model(**bert_family.family_config(kind, 50))
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    proto = bert_graph(written, read_safetensors(tmp_path / "model.safetensors"))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(3).integers(2, 50, size=(2, 30))
    mask = np.ones_like(ids)
    mask[1, 9:], ids[1, 9:] = 0, written.get("pad_token_id") or 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    [found] = session.run(None, {port.name: feed[port.name] for port in session.get_inputs()})
    with torch.no_grad():
        want = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    assert np.abs(found - want)[mask == 1].max() < 1e-4


def test_a_distilbert_folder_is_imported_whole(source: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = bert_family.family_weights("distilbert", len(vocabulary()))
    save_file({f"distilbert.{n}": a for n, a in weights.items()}, source / "model.safetensors")
    write_json(source / "config.json", bert_family.family_config("distilbert", len(vocabulary())))
    spec = import_encoder(source, tmp_path / "out")
    assert (spec.dim, spec.max_tokens) == (bert_family.HIDDEN, MAX_TOKENS)
    ids = TextTokenizer(source / "tokenizer.json", MAX_TOKENS).split([TEXTS[0]])[0].ids
    mean = bert_family.forward("distilbert", ids, weights).mean(0)
    np.testing.assert_allclose(
        open_encoder(tmp_path / "out").encode([TEXTS[0]])[0], mean / np.linalg.norm(mean), atol=1e-5
    )


def test_robertas_positions_end_behind_the_padding() -> None:
    config = bert_family.family_config("roberta", 50)
    assert read_config(config).positions == bert_family.POSITIONS - 2
    with pytest.raises(EncoderError, match=r"max_position_embeddings 2 leaves no position behind the first 2"):
        read_config(config | {"max_position_embeddings": 2})


# --------------------------------------------------------------------------------------- what is changed


def test_the_first_layers_alone_are_taken(source: Path, tmp_path: Path) -> None:
    import_encoder(source, tmp_path / "one", ImportSettings(layers=1))
    found = open_encoder(tmp_path / "one").encode(TEXTS)
    config = tiny_config() | {"num_hidden_layers": 1}
    np.testing.assert_allclose(found, expected(source, tiny_weights(), config), atol=2e-5)
    assert (tmp_path / "one/model.onnx").stat().st_size < len(
        bert_graph(tiny_config(), tiny_weights()).SerializeToString()
    )


def test_layers_are_cut_of_weights_even_beside_an_onnx_model(source: Path, tmp_path: Path) -> None:
    (source / "model.onnx").write_bytes(bert_graph(tiny_config(), tiny_weights()).SerializeToString())
    one, two = (import_encoder(source, tmp_path / f"{n}", ImportSettings(layers=n)).fingerprint for n in (1, 2))
    assert one != two
    with pytest.raises(InvalidParameter, match="layers must be between 1 and 2, got 3"):
        import_encoder(source, tmp_path / "out", ImportSettings(layers=3))
    (source / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"model\.safetensors: missing; layers are cut where a model is made from"):
        import_encoder(source, tmp_path / "out", ImportSettings(layers=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "source"]


def test_dim_cuts_the_vectors_and_makes_them_unit_length_again(source: Path, tmp_path: Path) -> None:
    whole = import_encoder(source, tmp_path / "whole")
    cut = import_encoder(source, tmp_path / "cut", ImportSettings(dim=5))
    assert cut.dim == 5 and cut.fingerprint != whole.fingerprint
    want = open_encoder(tmp_path / "whole").encode(TEXTS)[:, :5]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(open_encoder(tmp_path / "cut").encode(TEXTS), want, atol=1e-6)
    raw = import_encoder(source, tmp_path / "raw", ImportSettings(dim=5, normalize=False))
    assert raw.dim == 5 and not raw.normalize
    with pytest.raises(EncoderError, match=r"source/encoder\.json: dim 33 is more than the 32 values"):
        import_encoder(source, tmp_path / "out", ImportSettings(dim=33))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_pooling_and_prompts_are_written_where_sentence_transformers_reads_them(
    source: Path, tmp_path: Path, pooling: str
) -> None:
    settings = ImportSettings(pooling=pooling, normalize=False, prompts={"query": "query ", "passage": "passage "})
    spec = import_encoder(source, tmp_path / "out", settings)
    assert (spec.pooling, spec.normalize) == (pooling, False)
    assert spec.prompts == {"query": "query ", "passage": "passage "}
    written = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())
    assert written["prompts"] == {"query": "query ", "document": "passage "}
    steps = json.loads((tmp_path / "out/modules.json").read_text())
    assert [step["type"].rpartition(".")[2] for step in steps] == ["Transformer", "Pooling"]
    [ids] = [one.ids for one in TextTokenizer(source / "tokenizer.json", MAX_TOKENS).split(["query fox"])]
    hidden = bert(ids, tiny_weights(), tiny_config())
    want = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0)}[pooling]
    np.testing.assert_allclose(open_encoder(tmp_path / "out").encode(["fox"])[0], want, atol=1e-4)


def test_an_empty_prompt_takes_the_sources_away(source: Path, tmp_path: Path) -> None:
    write_json(source / "config_sentence_transformers.json", {"prompts": {"query": "q ", "document": "d "}})
    spec = import_encoder(source, tmp_path / "out", ImportSettings(prompts={"query": ""}))
    assert spec.prompts == {"passage": "d "}


def test_a_prompt_that_leaves_no_room_for_a_text_is_refused(source: Path, tmp_path: Path) -> None:
    prompt = "red fox " * 20
    with pytest.raises(
        EncoderError, match="the prompt of a query fills max_tokens, 4, and nothing is read of the text"
    ):
        import_encoder(source, tmp_path / "out", ImportSettings(prompts={"query": prompt}, max_tokens=4))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused_by_its_last_token(source: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(source / "tokenizer.json"))
    last = len(vocabulary())
    wanted = rf"source/tokenizer\.json: token '<extra>' has the number {last}, which the model does not know"
    with pytest.raises(EncoderError, match=wanted):
        import_encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [1, 32_768])
def test_what_a_tokenizer_says_of_lengths_is_no_bound_of_its_own(source: Path, tmp_path: Path, length: int) -> None:
    saved = json.loads((source / "tokenizer.json").read_text())
    cut = {"max_length": length, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    write_json(source / "tokenizer.json", saved | {"truncation": cut})
    assert import_encoder(source, tmp_path / "out").max_tokens == 24


def test_a_model_that_gives_every_text_the_same_vector_is_refused(source: Path, tmp_path: Path) -> None:
    # What is left are the normalisations' biases, with which vectors differ by rounding.
    weights = {n: array if n.endswith("LayerNorm.bias") else 0 * array for n, array in tiny_weights().items()}
    (source / "model.onnx").write_bytes(bert_graph(tiny_config(), weights).SerializeToString())
    with pytest.raises(EncoderError, match=r"source/model\.onnx: gives every text the same vector"):
        import_encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_out_of_bounds_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="pooling must be one of mean, cls, max, got 'sum'"):
        ImportSettings(pooling="sum")
    with pytest.raises(InvalidParameter, match="dim must be between 1 and 16384, got 0"):
        ImportSettings(dim=0)
    with pytest.raises(InvalidParameter, match="query prompt has 5000 characters, at most 4096 fit"):
        ImportSettings(prompts={"query": "x" * 5000})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"dimension": 5}', r"encoder\.json: Object contains unknown field `dimension`"),
        (b'{"dim": 0}', r"encoder\.json: Expected `int` >= 1 - at `\$\.dim`"),
        (b'{"measured": 3}', r"encoder\.json: Expected `object"),
    ],
)
def test_an_encoder_json_that_is_wrong_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_tiny_bert(tmp_path / "tiny")
    (folder / "encoder.json").write_bytes(content)
    with pytest.raises(EncoderError, match=message):
        open_encoder(folder)


def test_figures_are_no_part_of_the_fingerprint_and_what_changes_vectors_is(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "tiny")
    prints = [open_encoder(folder).spec.fingerprint]
    for own in ({"measured": {"a": 1}}, {"measured": {"a": 2}}, {"dim": 8}):
        write_json(folder / "encoder.json", own)
        prints.append(open_encoder(folder).spec.fingerprint)
    assert prints[0] == prints[1] == prints[2] != prints[3]
    assert (folder / "encoder.json") in encoder_files(folder)


# --------------------------------------------------------------------------------------------- cut short


def test_what_a_killed_import_left_is_swept_by_the_next_of_the_same_target(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from vecsvc import storage;"
        "from index_builders.encoder_import import import_encoder;"
        "storage.failpoint = lambda point: os.kill(os.getpid(), 9) if point == 'rename out' else None;"
        "import_encoder(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path / "out")], timeout=60)
    assert killed.returncode == -9
    [left] = [path for path in tmp_path.iterdir() if path.name.startswith(storage.STAGING)]
    other = tmp_path / f"{storage.STAGING}out-2-123"  # another target's
    other.mkdir()
    living = tmp_path / f"{storage.STAGING}out-1"
    living.mkdir()
    lease = storage.Lease.take(living, exclusive=True)
    assert lease is not None
    import_encoder(source, tmp_path / "out")
    assert not left.exists() and other.is_dir() and living.is_dir()
    lease.release()


def test_an_onnx_source_with_weights_outside_its_folder_is_refused(tmp_path: Path) -> None:
    source = write_tiny_bert(tmp_path / "source")
    model = onnx.load(str(source / "model.onnx"))
    onnx.external_data_helper.convert_model_to_external_data(model, location="../secret.bin", size_threshold=0)
    for weight in model.graph.initializer:
        weight.ClearField("raw_data")
    (source / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(b"\0" * 100_000)
    with pytest.raises(
        EncoderError, match=r"has weights in '\.\./secret\.bin'; they must lie in a file beside the model"
    ):
        import_encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_pools_itself_cannot_be_pooled_otherwise(tmp_path: Path) -> None:
    source = write_tiny_bert(tmp_path / "source")
    model = onnx.load(str(source / "model.onnx"))
    model.graph.node.append(
        onnx.helper.make_node("ReduceMax", ["last_hidden_state"], ["sentence_embedding"], axes=[1], keepdims=0)
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("sentence_embedding", 1, ["batch", 32]))
    (source / "model.onnx").write_bytes(model.SerializeToString())
    assert import_encoder(source, tmp_path / "out").pooling == "none"
    with pytest.raises(InvalidParameter, match=r"pooling 'cls' was asked for, but .*source's model pools itself"):
        import_encoder(source, tmp_path / "cls", ImportSettings(pooling="cls"))
