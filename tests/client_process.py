"""A client in a process of its own, to be killed: `client_process.py CONFIG [fake]`.

Writes a line of JSON for each thing that happens: {"pids": [...]} of all the engine's processes
once it is ready, {"error": "..."} when it died.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import psutil

from engine.client import EngineClient
from engine.config import JupiterConfig, load_config
from engine.errors import JupiterError


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def run(config: JupiterConfig, fake: bool) -> int:
    command = None
    if fake:
        import engine.client
        from tests.engine.conftest import fake_agent_command

        async def no_model(*_: object) -> Path:
            return Path()

        engine.client.prepare_model = no_model
        command = fake_agent_command
    client = EngineClient(config, command=command, attempts=0 if fake else 3)
    try:
        await client.start()
        say(pids=[child.pid for child in psutil.Process().children(recursive=True)])
        async for _ in client.submit(prompt="endless"):
            pass
        await asyncio.Event().wait()
    except JupiterError as error:
        say(error=str(error))
        return error.exit_code
    finally:
        await client.stop()
    return 0


if __name__ == "__main__":
    # A shell starts its background jobs with Ctrl+C ignored, and so their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(asyncio.run(run(load_config(sys.argv[1]), sys.argv[2:] == ["fake"])))
