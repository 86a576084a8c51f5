"""Reads config.json of the BERT family into one shape, whatever each family calls its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from vecsvc.errors import EncoderError, InvalidParameter

MODEL_TYPES: Final = ("bert", "camembert", "distilbert", "mpnet", "roberta", "xlm-roberta")
ACTIVATIONS: Final = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# DistilBERT's own words, and the ones that the others use for the same.
_DISTILBERT: Final = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
# Their positions count from behind the one of the padding token, and a token of the vocabulary tells which that is.
_ROBERTA: Final = ("camembert", "roberta", "xlm-roberta")
_MPNET_PADDING: Final = 1  # whatever its config says
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class BertConfig(msgspec.Struct, frozen=True, kw_only=True):
    model_type: str
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    vocab_size: _Size
    max_position_embeddings: _Size
    type_vocab_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False
    pad_token_id: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)] | None = None
    relative_attention_num_buckets: Annotated[int, msgspec.Meta(ge=4, le=1 << 16)] = 32

    @property
    def family(self) -> str:
        return "roberta" if self.model_type in _ROBERTA else self.model_type

    @property
    def first_position(self) -> int:
        """The row of the position table that the first token of a text has."""
        if self.family == "roberta":
            return (1 if self.pad_token_id is None else self.pad_token_id) + 1
        return _MPNET_PADDING + 1 if self.family == "mpnet" else 0

    @property
    def positions(self) -> int:
        """Tokens of the longest text that the model takes."""
        return self.max_position_embeddings - self.first_position

    @property
    def relative_buckets(self) -> int:
        """0 where scores do not depend on the distance of two tokens."""
        return self.relative_attention_num_buckets if self.family == "mpnet" else 0

    def kept_layers(self, asked: int | None) -> int:
        """Raises InvalidParameter where the model has fewer layers than are asked for."""
        if asked is None:
            return self.num_hidden_layers
        if not 1 <= asked <= self.num_hidden_layers:
            raise InvalidParameter(f"layers must be between 1 and {self.num_hidden_layers}, got {asked}")
        return asked


def read_config(config: Mapping[str, Any]) -> BertConfig:
    """Raises EncoderError where the config describes what cannot be converted; it names the value."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise EncoderError(
            f"model_type is {kind!r}; {', '.join(MODEL_TYPES)} can be converted, others need an onnx/model.onnx"
        )
    known = dict(config)
    if kind == "distilbert":
        known |= {ours: config[theirs] for theirs, ours in _DISTILBERT.items() if theirs in config}
    if kind in ("distilbert", "mpnet"):
        known["type_vocab_size"] = 0
    try:
        bert = msgspec.convert(known, BertConfig)
    except msgspec.ValidationError as error:
        raise EncoderError(f"model config: {error}") from error
    if bert.hidden_size % bert.num_attention_heads:
        raise EncoderError(
            f"model config: {bert.num_attention_heads} heads do not divide hidden_size {bert.hidden_size}"
        )
    if bert.hidden_act not in ACTIVATIONS:
        raise EncoderError(f"model config: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {bert.hidden_act!r}")
    if bert.position_embedding_type not in (None, "absolute") or bert.is_decoder:
        raise EncoderError("model config: only encoders with absolute position embeddings can be converted")
    if bert.positions < 1:
        raise EncoderError(
            f"model config: max_position_embeddings {bert.max_position_embeddings} leaves no position "
            f"behind the first {bert.first_position}"
        )
    return bert
