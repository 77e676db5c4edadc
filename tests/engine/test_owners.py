"""A process ends when one of its owners does, without its main thread's help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine.errors import ExitCode
from tests.engine.conftest import assert_gone

# Deaf to all but SIGKILL, and busy: what ends it is the watch's thread.
CHILD = """
import os, signal, sys
import engine.processes
engine.processes.HAVE_PIDFD = engine.processes.HAVE_PIDFD and sys.argv[2] == "pidfd"
from engine.owners import watch_owners
signal.signal(signal.SIGTERM, signal.SIG_IGN)
watch_owners(int(sys.argv[1]))
print(os.getpid(), flush=True)
while True:
    pass
"""
# A launcher between client and child.
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
"""


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(engine.__file__).parent.parent)},
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("means", ["pidfd", "polling"])
def test_a_process_ends_when_its_launcher_is_killed(means: str) -> None:
    with start(LAUNCHER, CHILD, str(os.getpid()), means) as launcher:
        child = int(first_line(launcher))
        launcher.kill()
        assert_gone([child], 3)


@pytest.mark.parametrize("means", ["pidfd", "polling"])
def test_a_process_ends_when_its_client_is_killed_above_the_launcher(means: str) -> None:
    client_code = (
        "import os, subprocess, sys\n"
        "words = sys.argv[1:3] + [str(os.getpid()), sys.argv[3]]\n"
        "subprocess.run([sys.executable, '-c', *words])"
    )
    with start(client_code, LAUNCHER, CHILD, means) as client:
        child = int(first_line(client))
        client.kill()
        assert_gone([child], 3)


def test_a_process_whose_client_had_died_before_ends_at_once() -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:  # its pid is in use, by nobody of ours
        with start(CHILD, str(stranger.pid), "pidfd") as child:
            assert child.wait(5) == ExitCode.ENGINE_FAILED
            assert child.stderr is not None
            assert f"the client (process {stranger.pid}) is gone" in child.stderr.read()
        stranger.kill()


def test_an_owned_module_ends_with_its_client_and_its_helpers_with_it(tmp_path: Path) -> None:
    (tmp_path / "helped.py").write_text(
        "import subprocess, sys, os\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "print(os.getpid(), helper.pid, *sys.argv[1:], flush=True)\n"
        "helper.wait()\n"
    )
    client_code = (
        "import os, subprocess, sys\n"
        "words = ['-m', 'engine.owned', str(os.getpid()), 'helped', 'an argument']\n"
        f"os.environ['PYTHONPATH'] += ':{tmp_path}'\n"
        "subprocess.run([sys.executable, *words], start_new_session=True)"
    )
    with start(client_code) as client:
        owned, helper, *words = first_line(client).split()
        assert words == ["an", "argument"]
        client.kill()
        assert_gone([int(owned), int(helper)], 3)


def test_an_owned_module_gives_its_exit_code_back(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(5 * (__name__ == '__main__'))")
    root = Path(engine.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "engine.owned", str(os.getpid()), "leaving"],
        env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"},
        timeout=10,
    )
    assert done.returncode == 5
