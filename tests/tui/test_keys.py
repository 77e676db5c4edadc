"""Keys of one's own: `keymap` in config.json."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace
from textual.binding import Binding

from engine.config import parse_config
from engine.errors import ConfigError
from tests.tui.chat import Chat
from tests.tui.fake_client import CONFIG
from tui.app import JupiterApp
from tui.keys import check, checked_keymap, every_binding

BINDINGS = [
    Binding("f1", "help", id="app.help"),
    Binding("f2", "chat", id="app.chat"),
    Binding("ctrl+g,f6", "again", id="chat.again"),
    Binding("ctrl+n", "new", id="chat.new"),
    Binding("ctrl+n", "next", id="stages.next"),
    Binding("enter", "unnamed"),
]


@pytest.mark.parametrize(
    "keymap",
    [
        {},
        {"chat.again": "ctrl+k"},
        {"chat.again": "alt+x, ?"},
        {"chat.again": "ctrl+n", "chat.new": "ctrl+g"},  # swapped
        {"stages.next": "f6"},  # another screen's key
        {"chat.new": "enter"},  # what has no id may be overruled
    ],
)
def test_a_keymap_that_every_screen_can_take_is_taken(keymap: dict[str, str]) -> None:
    check(keymap, BINDINGS)


@pytest.mark.parametrize(
    ("keymap", "told"),
    [
        ({"chat.agan": "f6"}, "unknown id 'chat.agan'; did you mean 'chat.again'?"),
        ({"nothing": "f6"}, "unknown id 'nothing'; the help (F1) tells the ids"),
        ({"chat.new": "ctrl+foo"}, "'chat.new': 'ctrl+foo' is no key"),
        ({"chat.new": "control+k"}, "'chat.new': 'control+k' is no key"),
        ({"chat.new": ""}, "'chat.new': '' is no key"),
        ({"chat.new": "f6"}, "'chat.new' and 'chat.again' cannot both be on 'f6'"),
        ({"chat.new": "f1"}, "'chat.new' and 'app.help' cannot both be on 'f1'"),
        ({"app.help": "ctrl+n"}, "'app.help' and 'chat.new' cannot both be on 'ctrl+n'"),
    ],
)
def test_a_wrong_keymap_is_one_line_that_names_the_id(keymap: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as raised:
        check(keymap, BINDINGS)
    assert str(raised.value).startswith("config key 'keymap': ")
    assert "\n" not in str(raised.value)


def test_a_key_that_edits_the_prompt_is_refused_where_the_prompt_is() -> None:
    editing = {"f7", "ctrl+k"}
    check({"stages.next": "f7"}, BINDINGS, editing)
    with pytest.raises(ConfigError, match=r"'chat.new': 'f7' edits the prompt"):
        check({"chat.new": "f7"}, BINDINGS, editing)
    with pytest.raises(ConfigError, match=r"'app.help': 'ctrl[+]k' edits the prompt"):
        checked_keymap({"app.help": "ctrl+k"})
    checked_keymap({"app.suspend": "ctrl+k"})  # comes before the prompt


def test_a_keymap_in_the_config_must_map_texts_to_texts() -> None:
    values = {"base_model_name_or_path": "m", "stage_num_hidden_layers_list": [1]}
    assert parse_config({**values, "keymap": {"a": "b"}}, "x").keymap == {"a": "b"}
    with pytest.raises(ConfigError, match="key 'keymap'"):
        parse_config({**values, "keymap": {"a": 1}}, "x")


def test_every_binding_that_has_an_id_is_known_and_clashes_with_no_other() -> None:
    ids = {binding.id for binding in every_binding() if binding.id is not None}
    assert {"app.help", "app.suspend", "app.telemetry", "chat.new"} <= ids
    for name in ids:
        checked_keymap({name: "ctrl+alt+f20"})


async def test_a_remapped_key_works_and_is_the_one_that_is_shown() -> None:
    chat = Chat()
    chat.app = JupiterApp(replace(CONFIG, keymap={"app.telemetry": "f11"}), chat._make_client)
    async with chat.app.run_test(size=(120, 36)) as chat.pilot:
        await chat.shows("f11 Telemetry")
        await chat.pilot.press("f4")
        assert chat.app.current_mode == "chat"
        await chat.pilot.press("f11")
        await chat.until(lambda: chat.app.current_mode == "telemetry")


def test_an_app_with_a_wrong_keymap_does_not_open() -> None:
    with pytest.raises(ConfigError, match=r"unknown id 'app.halp'; did you mean 'app.help'"):
        JupiterApp(replace(CONFIG, keymap={"app.halp": "f7"}))
