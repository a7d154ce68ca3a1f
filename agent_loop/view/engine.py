"""A model folder as a server: the embedded engine in a process of its own, for forks.

The engine lies in a layer above this one, so it is a command here, not an import. It listens on loopback, wants a key
that is drawn for it, and ends with this process, however that ends (`tools.keeper`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_loop.view.fork import ForkError
from agent_loop.view.whatif import Model
from tools import keeper

START_S = 600.0
"""Until the engine must answer: a large model takes minutes to read."""
POLL_S = 0.2
LAST_LINES = 5
_KEY = "WHAT_IF_ENGINE_KEY"


@contextmanager
def engine(folder: Path) -> Iterator[Model]:
    """The model of a folder, served for as long as the block runs.

    Raises:
        ForkError: it does not start; with the engine's last words.
    """
    key, name = secrets.token_urlsafe(24), "/".join(folder.resolve().parts[-2:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distill.serving.embedded", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", name, "--api-key-env", _KEY]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [*keeper.COMMAND, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {_KEY: key},
            start_new_session=True,
        )
        try:
            model = Model(f"http://127.0.0.1:{port}/v1", name, key)
            problem = asyncio.run(_ready(model, process))
            if problem is not None:
                log.seek(0)
                said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
                raise ForkError("\n  ".join([f"the embedded engine of {folder} {problem}:", *said[-LAST_LINES:]]))
            yield model
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


async def _ready(model: Model, process: subprocess.Popen[bytes]) -> str | None:
    """Waits until it answers; why it never will."""
    from agent_loop.evaluate import served
    from agent_loop.transport import HttpTransport, TransportError

    transport = HttpTransport(model.base_url, api_key=model.api_key, retry_deadline_s=0.0)
    deadline = time.monotonic() + START_S
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return f"ended with code {process.returncode}"
            try:
                await served(transport, model.base_url, model.name)
                return None
            except TransportError as error:
                if error.kind != "unavailable":
                    return f"does not answer as it should ({error})"
            await asyncio.sleep(POLL_S)
        return f"does not answer within {START_S:g} s"
    finally:
        await transport.aclose()
