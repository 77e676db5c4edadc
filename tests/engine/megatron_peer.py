"""megatron-core itself, in a process of its own: `python megatron_peer.py MODEL OURS THEIRS PORT`.

Loads the checkpoint OURS of the model in MODEL and prints by how much its logits differ from
transformers'; then writes a model of other, random weights to THEIRS with its logits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from engine.model.config import ModelConfig

PROMPT = list(range(3, 20))


def build(config: ModelConfig) -> Any:
    """A GPTModel of the config's shape, on the CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=config.attention_bias,
        layernorm_epsilon=config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        shape,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=512,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_theta),
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    size = len(PROMPT)
    hidden = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    return model(torch.tensor([PROMPT]), torch.arange(size)[None], hidden)[0]


def main(folder: Path, ours: Path, theirs: Path, port: str) -> None:
    import transformers
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    torch.cuda.synchronize = lambda: None
    torch.cuda.current_device = lambda: "cpu"  # it computes on one even without dropout
    tensor_parallel.get_cuda_rng_tracker().fork = contextlib.nullcontext
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model = build(ModelConfig.from_folder(folder))
    state = dist_checkpointing.load(model.sharded_state_dict(), str(ours))
    assert (state.pop("args").num_layers, state.pop("iteration")) == (6, 1)
    assert state.pop("checkpoint_version") == 3.0
    model.load_state_dict(state)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        difference = (logits(model) - reference(torch.tensor([PROMPT])).logits[0]).abs().max()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = model.sharded_state_dict()
    state |= {"args": argparse.Namespace(num_layers=6), "iteration": 1, "checkpoint_version": 3.0}
    theirs.mkdir(parents=True)
    dist_checkpointing.save(state, str(theirs))
    torch.save(logits(model), theirs.parent / "logits.pt")
    torch.distributed.destroy_process_group()
    print(json.dumps({"difference": float(difference)}))


if __name__ == "__main__":  # its writer starts processes that import this file
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
