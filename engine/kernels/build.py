"""Compiles `layers.cpp` once for this machine and keeps the library in the cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from engine.paths import cache_dir

SOURCE = Path(__file__).with_name("layers.cpp")
HEADERS = ("attention.h", "judge.h", "pool.h", "products.h", "rows.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
NEEDED = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512_vnni"))
COMPILE_S = 120


class NoKernelsError(Exception):
    """Why the compiled kernels cannot be used here; the caller goes on without them."""


def must_compile() -> bool:
    """`load_kernels` will take a few seconds, as the library is not in the cache yet."""
    try:
        return not _library()[1].exists()
    except NoKernelsError:
        return False


@lru_cache(maxsize=1)
def load_kernels() -> ctypes.CDLL:
    """The library, compiled where it is not in the cache yet (a few seconds).

    Raises:
        NoKernelsError: another kind of processor, no C++ compiler, or one that fails.
    """
    compiler, path = _library()
    if not path.exists():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernelsError(f"{path}: {error}") from None


def _library() -> tuple[str, Path]:
    """The compiler, and the file that it makes for this machine."""
    missing = NEEDED - cpu_flags()
    if missing:
        raise NoKernelsError(f"this processor lacks {', '.join(sorted(missing))}")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NoKernelsError("there is no C++ compiler (c++ or g++)")
    return compiler, cache_dir() / "kernels" / f"layers-{_key(compiler)}.so"


def cpu_flags() -> frozenset[str]:
    """What this processor can do, by Linux's names; empty where that cannot be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _key(compiler: str) -> str:
    """Of everything that the library depends on."""
    flags = " ".join(sorted(cpu_flags()))
    files = (SOURCE, *map(SOURCE.with_name, HEADERS))
    texts = [file.read_text(encoding="utf-8") for file in files]
    parts = [*texts, *FLAGS, compiler, platform.machine(), flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [*compiler.split(), *FLAGS, "-o", str(unfinished), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise NoKernelsError(f"{compiler} failed: {reason}")
        unfinished.replace(path)  # several stages may compile at once; each result is whole
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelsError(f"{compiler}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
