"""The model against transformers, on tiny random weights in float32."""

from __future__ import annotations

import psutil
import pytest
import torch

from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache, KVStore
from engine.model.llama import Rows, Segment
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM, fuse_projections
from engine.pipeline.batch import Entry, Judge, attention_rows
from engine.pipeline.stage import Stage
from tests.tiny import KINDS, reference

VICUNA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
VICUNA_TREE = """MedusaLlamaForCausalLM(
  (model): LlamaModel(
    (embed_tokens): Embedding(32000, 4096, padding_idx=0)
    (layers): ModuleList(
      (0-31): 32 x LlamaDecoderLayer(
        (self_attn): LlamaAttention(
          (q_proj): Linear(in_features=4096, out_features=4096, bias=False)
          (k_proj): Linear(in_features=4096, out_features=4096, bias=False)
          (v_proj): Linear(in_features=4096, out_features=4096, bias=False)
          (o_proj): Linear(in_features=4096, out_features=4096, bias=False)
          (rotary_emb): LlamaRotaryEmbedding()
        )
        (mlp): LlamaMLP(
          (gate_proj): Linear(in_features=4096, out_features=11008, bias=False)
          (up_proj): Linear(in_features=4096, out_features=11008, bias=False)
          (down_proj): Linear(in_features=11008, out_features=4096, bias=False)
          (act_fn): SiLU()
        )
        (input_layernorm): LlamaRMSNorm()
        (post_attention_layernorm): LlamaRMSNorm()
      )
    )
    (norm): LlamaRMSNorm()
  )
  (lm_head): Linear(in_features=4096, out_features=32000, bias=False)
  (medusa_head): ModuleList(
    (0-4): 5 x Sequential(
      (0): ResBlock(
        (linear): Linear(in_features=4096, out_features=4096, bias=True)
        (act): SiLU()
      )
      (1): Linear(in_features=4096, out_features=32000, bias=False)
    )
  )
)"""


def stages_of(model, split: list[int], *, fuse: bool = True) -> list[Stage]:
    """A transformers model as stages of ours, with the same weights."""
    config = ModelConfig.from_dict(
        {**model.config.to_dict(), "architectures": [type(model).__name__]}
    )
    weights, stages, at = model.state_dict(), [], 0
    for index, count in enumerate(split):
        first, last = index == 0, index == len(split) - 1
        part = MedusaLlamaForCausalLM(config, layers=range(at, at + count), first=first, last=last)
        part.load_state_dict({key: weights[key] for key in part.state_dict()})
        if fuse:
            fuse_projections(part)
        stages.append(
            Stage(
                part.eval(),
                first=first,
                last=last,
                context_length=256,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
        )
        at += count
    return stages


def run_all(stages: list[Stage], entries: list[Entry]) -> torch.Tensor:
    """Logits [rows, vocab] of a micro-batch passed through every stage."""
    hidden = None
    for stage in stages:
        hidden = stage.run(entries, hidden)
    with torch.inference_mode():
        return stages[-1].forward.logits(hidden)


def chain(slot: int, start: int, tokens: list[int]) -> Entry:
    return Entry(slot, start, tokens, list(range(-1, len(tokens) - 1)), Judge.LAST)


def test_vicuna_7b_has_the_published_module_tree_and_parameter_count() -> None:
    with torch.device("meta"):
        model = MedusaLlamaForCausalLM(
            ModelConfig.from_dict(VICUNA_7B), HeadShape(5, 1, vocab_size=32000)
        )
    assert str(model) == VICUNA_TREE
    assert sum(p.numel() for p in model.parameters()) == 7_477_682_176


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [[6], [2, 3, 1]], ids=str)
def test_logits_equal_transformers_whole_and_in_chunks(kind: str, split: list[int]) -> None:
    model = reference(kind)
    tokens = torch.randint(0, 250, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    stages = stages_of(model, split)
    torch.testing.assert_close(run_all(stages, [chain(0, 0, tokens)]), expected, atol=1e-4, rtol=0)
    chunked = [run_all(stages, [chain(1, at, tokens[at : at + 16])]) for at in range(0, 41, 16)]
    torch.testing.assert_close(torch.cat(chunked), expected, atol=1e-4, rtol=0)


def test_fusing_projections_changes_nothing() -> None:
    model = reference("linear_rope")
    entry = [chain(0, 0, list(range(20)))]
    plain = run_all(stages_of(model, [6], fuse=False), entry)
    torch.testing.assert_close(run_all(stages_of(model, [6]), entry), plain, atol=1e-5, rtol=0)


def test_each_tree_node_sees_only_its_own_path() -> None:
    model = reference("llama")
    stages = stages_of(model, [3, 3])
    prompt = list(range(5, 17))
    run_all(stages, [chain(0, 0, prompt)])
    #      0 ── 1 ── 3
    #       └── 2 ── 4
    tree = Entry(0, 12, [50, 51, 52, 53, 54], [-1, 0, 0, 1, 2], Judge.TREE)
    logits = run_all(stages, [tree])
    for path in ([0, 1, 3], [0, 2, 4]):
        tokens = prompt + [tree.tokens[node] for node in path]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0, 12:]
        torch.testing.assert_close(logits[path], expected, atol=1e-4, rtol=0)


def test_compaction_keeps_the_accepted_rows_on_every_stage() -> None:
    model = reference("llama")
    stages = stages_of(model, [3, 3])
    run_all(stages, [chain(0, 0, [1, 2, 3])])
    run_all(stages, [Entry(0, 3, [50, 51, 52, 53, 54], [-1, 0, 0, 1, 2], Judge.TREE)])
    after = chain(0, 6, [60])
    after.keep, after.keep_to = [5, 7], 4  # nodes 2 and 4 behind the root, which lies right
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3, 50, 52, 54, 60]])).logits[0, -1:]
    torch.testing.assert_close(run_all(stages, [after]), expected, atol=1e-4, rtol=0)


def test_sequences_of_a_ragged_batch_do_not_see_each_other() -> None:
    model = reference("qwen2")
    stages = stages_of(model, [6])
    lengths = (3, 17, 1, 9)
    entries = [chain(slot, 0, list(range(slot, slot + n))) for slot, n in enumerate(lengths)]
    logits = run_all(stages, entries).split(lengths)
    for entry, got in zip(entries, logits, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([entry.tokens])).logits[0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_gradients_without_a_cache_equal_transformers() -> None:
    model = reference("qwen2")
    config = ModelConfig.from_dict(
        {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    )
    ours = MedusaLlamaForCausalLM(config)
    ours.load_state_dict(model.state_dict())
    lengths, losses = (9, 5), []
    tokens = torch.randint(0, 250, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    rows = Rows(
        torch.cat([torch.arange(n) for n in lengths]), [Segment(slice(0, 9)), Segment(slice(9, 14))]
    )
    ours.lm_head(ours(tokens, rows)).logsumexp(-1).sum().backward()
    for part in tokens.split(lengths):
        losses.append(model(part[None]).logits.logsumexp(-1).sum())
    sum(losses).backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


def test_sequences_attended_together_equal_each_alone() -> None:
    model = reference("llama")
    together, alone = stages_of(model, [3, 3]), stages_of(model, [3, 3])
    prompts = {slot: list(range(5 + slot, 7 + 3 * slot)) for slot in (1, 4, 5, 7)}
    parents = [-1, 0, 0, 1]
    chunks = [chain(slot, 0, prompt) for slot, prompt in prompts.items()]
    steps = [Entry(s, len(p), [9, 8, s, 6], parents, Judge.TREE) for s, p in prompts.items()]
    # 4, 5 and 7 share a cache, with a slot between them that nobody has.
    mixed = [steps[2], chain(9, 0, [3, 1, 4]), steps[0], steps[3], steps[1]]
    run_all(together, chunks)
    got = run_all(together, mixed)
    for entry in chunks:
        run_all(alone, [entry])
    expected = torch.cat([run_all(alone, [entry]) for entry in mixed])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_moving_kv_rows_is_safe_where_source_and_target_overlap() -> None:
    cache = KVCache(1, 1, 8, 1, dtype=torch.float32, device="cpu")
    cache.k[0, 0, 0, :, 0] = torch.arange(8.0)
    cache.v.copy_(cache.k)
    cache.move(0, [3, 4, 6], to=2)
    assert cache.k[0, 0, 0, :, 0].tolist() == [0, 1, 3, 4, 6, 5, 6, 7]
    assert cache.v.equal(cache.k)


def test_positions_follow_depth_not_order() -> None:
    stage = stages_of(reference("llama"), [6])[0]
    store = KVStore(6, 2, 32, 8, dtype=torch.float32, device="cpu")
    rows = attention_rows(
        [Entry(0, 10, [1, 2, 3, 4], [-1, 0, 0, 2], Judge.TREE)],
        store,
        groups=2,
        dtype=torch.float32,
        device=stage.device,
    )
    assert rows.positions.tolist() == [10, 11, 11, 12]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 5}, "32 heads over 5 KV heads"),
    ],
)
def test_an_unsupported_feature_is_named(change: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        ModelConfig.from_dict({**VICUNA_7B, **change})
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(CheckpointError, match="'hidden_size' is missing"):
        ModelConfig.from_dict({k: v for k, v in VICUNA_7B.items() if k != "hidden_size"})


def test_an_emptied_slot_gives_its_memory_back_and_only_its_own() -> None:
    # Slots 2 and 3 share one cache; a slot of a layer fills whole pages.
    store = KVStore(2, 1, 4096, 16, dtype=torch.float32, device="cpu")
    for slot in (2, 3):
        cache, place = store.find(slot)
        cache.k[:, place] = cache.v[:, place] = 1.0 + slot
    before = psutil.Process().memory_info().rss
    store.copy(2, 2, 0)
    released = before - psutil.Process().memory_info().rss
    cache, place = store.find(2)
    size = 4 * cache.k[0, place].nbytes  # two layers, keys and values
    assert released > 0.8 * size
    assert not cache.k[:, place].any()
    assert not cache.v[:, place].any()
    cache, place = store.find(3)
    assert (cache.k[:, place] == 4.0).all()
    assert store.row_bytes == 2 * 2 * 16 * 4
