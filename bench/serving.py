"""What benchmarks share: a model on a server of its own, and the CPU time of the processes that they start."""

from __future__ import annotations

import os
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 300.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    base_url: str
    """Ends in /v1."""
    command: str
    """By which it was started."""


@contextmanager
def served(model: Path | str, name: str, *flags: str, environment: Mapping[str, str] = os.environ) -> Iterator[Served]:
    """The embedded engine in a process of its own, on a free port of loopback.

    Args:
        name: under which it is asked.

    Raises:
        RuntimeError: it does not answer; with the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "distill.serving.embedded", "--model", str(model), "--served-model-name", name]
    command += ["--port", str(port), *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-2000:]
                    raise RuntimeError(f"no server by {shlex.join(['python', *command])}:\n{said}")
                time.sleep(0.1)
            yield Served(f"http://127.0.0.1:{port}/v1", shlex.join(["python", *command]))
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5.0).close()
    except OSError:
        return False
    return True


def cpu_of_children() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
