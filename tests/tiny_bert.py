"""Makes a BERT encoder small enough for tests: real files and a real tokenizer, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from index_builders.bert_graph import bert_graph

MAX_TOKENS = 24
POSITIONS = 32
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = """the a of to in and or not is it on for with how do i list files folder vector search quick brown fox jumps
over lazy dog naive cafe markup more query passage document find text index build copy move delete show print name
red green blue cat tree house water fire stone bread music river mountain cloud"""


def write_tiny_bert(folder: Path, *, dim: int = 32, seed: int = 7) -> Path:
    """Write an encoder folder that open_encoder reads: dim a multiple of 2, mean pooling, unit length, 24 tokens.

    The same arguments give the same files; another seed gives an encoder that agrees with this one about nothing.
    """
    _write_configs(folder, dim)
    model = bert_graph(tiny_config(dim), tiny_weights(dim, seed))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def write_tiny_source(folder: Path, *, dim: int = 32, seed: int = 7, prefix: str = "") -> Path:
    """Write the same encoder as a Hugging Face folder with safetensors: what import_encoder converts."""
    from safetensors.numpy import save_file

    _write_configs(folder, dim)
    write_json(folder / "config.json", tiny_config(dim))
    weights = {prefix + name: array for name, array in tiny_weights(dim, seed).items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def tiny_config(dim: int = 32) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_size": dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * dim,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }


def tiny_weights(dim: int = 32, seed: int = 7) -> dict[str, NDArray[np.float32]]:
    """Random weights by their Hugging Face names. Words weigh most, so that texts that share words are near."""
    random = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.1) -> NDArray[np.float32]:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    weights: dict[str, NDArray[np.float32]] = {}

    def linear(name: str, inner: int, outer: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(outer, inner), draw(outer)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + draw(dim), draw(dim)

    weights["embeddings.word_embeddings.weight"] = draw(len(vocabulary()), dim, scale=1.0)
    weights["embeddings.position_embeddings.weight"] = draw(POSITIONS, dim)
    weights["embeddings.token_type_embeddings.weight"] = draw(2, dim)
    norm("embeddings.LayerNorm")
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for name in ("query", "key", "value"):
            linear(f"{layer}attention.self.{name}", dim, dim)
        linear(f"{layer}attention.output.dense", dim, dim)
        norm(f"{layer}attention.output.LayerNorm")
        linear(f"{layer}intermediate.dense", dim, 2 * dim)
        linear(f"{layer}output.dense", 2 * dim, dim)
        norm(f"{layer}output.LayerNorm")
    return weights


def vocabulary() -> dict[str, int]:
    """Some words, and every letter, digit and sign, so that no ASCII text becomes [UNK]."""
    signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*SPECIAL, *signs, *(f"##{sign}" for sign in signs), *(word for word in WORDS.split() if len(word) > 1)]
    return {piece: number for number, piece in enumerate(pieces)}


def tiny_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer as BERT's. Like many published ones, its file says to pad always, and to cut early."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary(), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(12)
    return tokenizer


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2), "utf-8")


def _write_configs(folder: Path, dim: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    steps = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{step}"}
        for number, (path, step) in enumerate(steps.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "1_Pooling/config.json",
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
        },
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None})
