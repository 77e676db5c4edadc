"""The files of a model and its heads by their hashes: checked, sent, received. Torch-free."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.checkpoint.head_layouts import head_weights
from engine.checkpoint.mcore_files import is_mcore
from engine.checkpoint.sources import parse_source, resolve_cached
from engine.checkpoint.weight_files import TOKENIZER_FILES, WEIGHT_FILES, find_weights
from engine.errors import CheckpointError
from engine.paths import cache_dir, make_private, state_dir

BLOCK = 1 << 20
PART_BYTES = 1 << 18
"""What is sent of a file at a time: little enough that heartbeats get through a slow link."""
HASHES = "hashes.json"
KEPT_HASHES = 1000
CONFIG = "config.json"


class FileId(msgspec.Struct, frozen=True):
    """A file, by what is in it."""

    name: str
    size: int
    sha256: str


class Artifact(msgspec.Struct, frozen=True):
    """A model, or heads: what the first machine calls it, and the files that a stage reads."""

    source: str
    is_file: bool
    """It is a file of its own, not a folder of them."""
    files: tuple[FileId, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def describe(source: str, path: Path) -> tuple[Artifact, list[Path]]:
    """The artifact at `path`, and its files here in the same order. Reads them whole, the first
    time.

    Raises CheckpointError.
    """
    if is_mcore(path):
        raise CheckpointError(
            f"{path}: a Megatron-Core checkpoint cannot be used on several machines; "
            "`jupiter export` writes it as a Hugging Face folder"
        )
    paths = _read_by_stages(path)
    return Artifact(source, path.is_file(), tuple(file_id(each) for each in paths)), paths


def _read_by_stages(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    weights = head_weights(path)
    index = [name for name in WEIGHT_FILES if name.endswith(".json")]
    whole = [each for each in TOKENIZER_FILES if all((path / name).is_file() for name in each)]
    named = [path / name for name in (CONFIG, *index, *(whole[0] if whole else ()))]
    return [*find_weights(weights).files, *(file for file in named if file.is_file())]


def file_id(path: Path) -> FileId:
    """Size and hash of a file; the hash is kept for as long as the file is the same.

    Raises CheckpointError when it cannot be read.
    """
    kept = state_dir() / HASHES
    try:
        stat = path.stat()
        mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        hashes = _kept(kept)
        if mark not in hashes:
            with path.open("rb") as file:
                hashes[mark] = hashlib.file_digest(file, "sha256").hexdigest()
            with suppress(OSError):  # then it is computed again the next time
                _keep(kept, dict(list(hashes.items())[-KEPT_HASHES:]))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return FileId(path.name, stat.st_size, hashes[mark])


def _kept(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _keep(path: Path, hashes: dict[str, str]) -> None:
    make_private(path.parent)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(msgspec.json.encode(hashes))
    new.replace(path)


def own_copy(artifact: Artifact) -> Path | None:
    """This machine's copy, by the name that the first machine uses, or else one received before;
    None where there is none.

    Raises CheckpointError, naming the file, when the copy has something else in it.
    """
    path = _named(artifact.source)
    return verified(artifact) if path is None else _checked(path, artifact)


def verified(artifact: Artifact) -> Path | None:
    """What was received of it before, looked at once more; None where nothing was.

    Raises CheckpointError as `own_copy`.
    """
    path = received(artifact)
    return path and _checked(path, artifact)


def _checked(path: Path, artifact: Artifact) -> Path:
    for file in artifact.files:
        _check(path if path.is_file() else path / file.name, file)
    return path


def received(artifact: Artifact) -> Path | None:
    """What was received of it before."""
    folder = received_folder(artifact)
    if not folder.is_dir():
        return None
    return folder / artifact.files[0].name if artifact.is_file else folder


def _named(source: str) -> Path | None:
    try:
        parse_source(source)
    except CheckpointError:  # a path of the first machine's that is not here
        return None
    return resolve_cached(source)


def _check(path: Path, wanted: FileId) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though the first machine has it; {_REMEDY}")
    found = file_id(path)
    if (found.size, found.sha256) != (wanted.size, wanted.sha256):
        raise CheckpointError(
            f"{path}: another file than the first machine's (sha256 {found.sha256[:12]}, "
            f"there {wanted.sha256[:12]}); {_REMEDY}"
        )


_REMEDY = "bring the same here, or join with --receive to have the first machine's sent"


def received_folder(artifact: Artifact) -> Path:
    """Where it is kept when it was received; named after what is in it."""
    digest = hashlib.sha256("".join(file.sha256 for file in artifact.files).encode())
    return cache_dir() / "received" / digest.hexdigest()[:32]


def read_part(path: Path, offset: int) -> bytes:
    """A part of a file to send; raises OSError."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PART_BYTES)


class Receiver:
    """An artifact that is received, part by part; the folder appears when it is whole and right.

    Raises CheckpointError: its names are no plain names, or the disk will not have it.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._folder = received_folder(artifact)
        self._partial = self._folder.with_name(f".{self._folder.name}.{os.getpid()}")
        for file in artifact.files:
            if Path(file.name).name != file.name or file.name in ("", ".", ".."):
                raise CheckpointError(f"refused to receive {file.name!r}: not a plain file name")
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            make_private(self._partial.parent)
            self._partial.mkdir(mode=0o700)
        except OSError as error:
            raise CheckpointError(f"{self._partial}: {error.strerror}") from None
        self.received = 0
        """Bytes so far."""
        self._parts = self._take_all()
        self.wanted: tuple[int, int] | None = next(self._parts)
        """File (its number) and offset of the next part; None when all is there."""

    def take(self, data: bytes) -> None:
        """Take the part that was wanted; raises CheckpointError."""
        try:
            self.wanted = self._parts.send(data)
            if self.wanted is None:
                self._partial.replace(self._folder)
        except OSError as error:
            raise CheckpointError(f"{self._partial}: {error.strerror}") from None

    def close(self) -> None:
        """Remove what is not whole; idempotent."""
        self._parts.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _take_all(self) -> Generator[tuple[int, int] | None, bytes, None]:
        for number, wanted in enumerate(self._artifact.files):
            digest, offset = hashlib.sha256(), 0
            with (self._partial / wanted.name).open("wb") as file:
                while offset < wanted.size:
                    data = yield number, offset
                    if not data or offset + len(data) > wanted.size:
                        raise CheckpointError(f"{wanted.name}: received in another size than told")
                    file.write(data)
                    digest.update(data)
                    offset += len(data)
                    self.received += len(data)
            if digest.hexdigest() != wanted.sha256:
                raise CheckpointError(f"{wanted.name}: damaged on the way: its hash is another")
        yield None
