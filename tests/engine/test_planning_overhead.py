"""What answers took beyond stages and links by themselves is found in the profile again."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.config import JupiterConfig, parse_config
from engine.planning.answers import Took, prompts_of
from engine.planning.chunks import prefill_chunks
from engine.planning.overhead import with_overhead
from engine.planning.planner import predict
from engine.planning.profiles import DeviceProfile, LinkProfile, Profile
from engine.planning.setup import costs_of, met, workload
from engine.protocol import Message
from engine.text import TextCodec
from tests.tiny import tiny_folder

ROWS = 300


@pytest.fixture(scope="module")
def config() -> JupiterConfig:
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": [3, 3],
        "max_kv_cache_length": 1024,
        "device": "cpu",
    }
    return parse_config(values, "test")


def profile(stage_ms: float = 0.0, busy_ms: float = 0.0) -> Profile:
    device = DeviceProfile(
        name="cpu",
        host="here",
        rows=(1, 256),
        layer_ms=((0.2, 8.0),),
        stage_ms=stage_ms,
        slowdown=1.5,
        share_slowdown=1.5,
    )
    link = LinkProfile(latency_ms=0.2, mbit_per_s=1000.0, busy_ms=busy_ms)
    return Profile(devices=(device, device), links=(link, link))


def took(config: JupiterConfig, known: Profile) -> Took:
    """Answers that take what a known profile predicts."""
    folder = tiny_folder()
    seen = Took(ttft_s=[1.0], step_s=[1.0], tokens_per_step=[1.0], rows=ROWS)
    split = config.stage_num_hidden_layers_list
    chunks = prefill_chunks(ROWS, 2, config.num_sub_sequences, config.max_sub_sequence_len)
    load = met(workload(config, folder, ROWS, 1), seen)
    found = predict(costs_of(config, folder, known), split, load, chunks)
    return Took(
        ttft_s=[9.0, found.ttft_s, 0.0],  # the median counts
        step_s=[found.step.seconds],
        tokens_per_step=[1.0],
        rows=ROWS,
    )


def test_what_was_left_unexplained_is_told_of_stages_and_links(config: JupiterConfig) -> None:
    known = profile(stage_ms=1.5, busy_ms=4.0)
    found = with_overhead(config, tiny_folder(), profile(), took(config, known))
    assert [device.stage_ms for device in found.devices] == pytest.approx([1.5, 1.5])
    assert [link.busy_ms for link in found.links] == pytest.approx([4.0, 4.0], abs=0.01)


def test_nothing_is_left_where_answers_took_what_was_predicted(config: JupiterConfig) -> None:
    found = with_overhead(config, tiny_folder(), profile(), took(config, profile()))
    assert found.devices[0].stage_ms == pytest.approx(0.0, abs=1e-6)
    assert found.links[0].busy_ms == pytest.approx(0.0, abs=0.01)
    assert with_overhead(config, tiny_folder(), profile(), Took()) == profile()


def test_answers_on_one_stage_tell_of_no_link(config: JupiterConfig) -> None:
    one = replace(config, stage_num_hidden_layers_list=[6])
    alone = replace(profile(), devices=profile().devices[:1], links=())
    seen = Took(ttft_s=[1.0], step_s=[0.1], tokens_per_step=[1.0], rows=ROWS)
    found = with_overhead(one, tiny_folder(), alone, seen)
    assert found.links == () and found.devices[0].stage_ms > 0


def test_prompts_have_the_length_that_was_asked_for_and_begin_unlike() -> None:
    folder = tiny_folder()
    codec = TextCodec(folder, folder / "tokenizer.json", [0])
    texts = prompts_of(folder, 200, 3)
    rendered = [codec.render([Message("user", text)]) for text in texts]
    sizes = [len(codec.encode(text, add_special_tokens=False)) for text in rendered]
    assert all(200 <= size < 220 for size in sizes)
    assert len({text[:11] for text in texts}) == 3
