"""The Ray that rollout workers live in: one that the run starts and ends, or one that is there."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import RayConfig, RunConfig
from tools import keeper

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
"""For a Ray of our own to start."""
GRACE_S = 3.0
"""For its processes to end by themselves; by then there is nothing that they must not lose."""


class WorkersError(Exception):
    """The workers cannot play the run's episodes as it is configured; the message says why, and on which machine."""


def check_installed(config: RunConfig) -> None:
    """
    Raises:
        WorkersError: `rollout.executor` is "ray", and Ray is not installed.
    """
    if config.rollout.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise WorkersError(
            "rollout.executor is \"ray\", but Ray is not installed: pip install -e '.[ray]', or rollout.executor = "
            '"asyncio" to play the episodes in this process'
        )


def players(config: RunConfig) -> str:
    """Who plays the episodes, in words."""
    ray = config.rollout.ray
    if config.rollout.executor == "asyncio":
        return f"this process, {config.rollout.max_concurrent} at once"
    where = f"the Ray cluster at {ray.address}" if ray.address else "a Ray of this run"
    return f"{ray.workers} workers on {where}, up to {ray.episodes_per_worker} at once in each"


class RayCluster:
    """Ray's module `ray`, connected.

    Without `rollout.ray.address` a Ray is started on this machine (`distill.ray_head`), in a folder of this user alone,
    under a token that is drawn anew. It ends with the run, however the run ends.

    Args:
        logs: folder that gets the output of the Ray that is started, and at its end what its workers printed.
    """

    def __init__(self, config: RayConfig, logs: Path) -> None:
        self._config = config
        self._logs = logs
        self._folder: Path | None = None
        self._head: subprocess.Popen[bytes] | None = None
        self._ray: Any = None

    async def join(self) -> Any:
        """Start or find Ray.

        Returns:
            The module `ray`.

        Raises:
            WorkersError: it does not start; there is no cluster, or none that takes this version and token; or the
                cluster has machines that cannot reach this one.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        address = self._config.address or await self._start()
        # Ray takes SIGTERM for itself, at its import and again; it is the run that decides what a signal means.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            import ray

            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise WorkersError(f"rollout.ray.address: no Ray at {address}: {words}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._ray = ray
        self._refuse_if_out_of_reach()
        return ray

    def alive(self) -> bool:
        """Whether this machine is still a node of it: without one no worker can be started, and Ray waits for ever."""
        own = self._ray.get_runtime_context().get_node_id()
        return any(node["NodeID"] == own and node["Alive"] for node in self._ray.nodes())

    async def leave(self) -> None:
        """End the Ray that `join` started; leave one that was there. Idempotent."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None
        if self._folder is not None:
            _keep_output(self._folder, self._logs)
            self._folder = None
        if self._head is not None:
            assert self._head.stdin is not None
            self._head.stdin.close()  # the keeper ends Ray and removes its folder
            await asyncio.to_thread(self._head.wait)
            self._head = None

    async def _start(self) -> str:
        """Start a Ray; returns its address."""
        # Not what it is called after: 0 makes Ray take loopback for this machine's address, on every system.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once in a process
        self._folder = folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._logs.mkdir(parents=True, exist_ok=True)
        output = self._logs / "ray.log"
        self._head = _head(folder, math.ceil(self._config.workers * self._config.cpus), output)
        deadline = time.monotonic() + START_S
        while not (folder / "address").exists():
            if self._head.poll() is not None or time.monotonic() > deadline:
                words = output.read_text(errors="replace").strip()[-1000:] or f"no address within {START_S:g} s"
                raise WorkersError(f"Ray did not start ({output}): {words}")
            await asyncio.sleep(0.1)
        return (folder / "address").read_text()

    def _refuse_if_out_of_reach(self) -> None:
        own = self._ray.util.get_node_ip_address()
        others = elsewhere(self._ray.nodes(), own)
        if others and self._config.host is None:
            raise WorkersError(
                f"rollout.ray.host is not given, but the Ray cluster has machines other than this one "
                f"({', '.join(others)}), which cannot reach its loopback address for completions; set rollout.ray.host "
                f"to this machine's address in a network that you trust, such as {own}"
            )


def elsewhere(nodes: Sequence[Mapping[str, Any]], own: str) -> list[str]:
    """Addresses of a cluster's living machines other than this one (`ray.nodes()`)."""
    return sorted({node["NodeManagerAddress"] for node in nodes if node["Alive"]} - {own})


def _head(folder: Path, num_cpus: int, output: Path) -> subprocess.Popen[bytes]:
    """Start `distill.ray_head` under a keeper, which removes the folder in the end."""
    command = [sys.executable, "-m", "distill.ray_head", str(folder), str(num_cpus)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # workers inherit it
    with output.open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own program
            [*keeper.COMMAND, f"--grace={GRACE_S}", f"--remove={folder}", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path},
        )


def _keep_output(folder: Path, logs: Path) -> None:
    """What workers printed, without Ray's own lines."""
    for file in folder.glob("ray/session_2*/logs/worker-*"):
        lines = file.read_text(errors="replace").splitlines(keepends=True)
        said = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        if said:
            (logs / f"worker-{file.name.rpartition('-')[2]}").write_text("".join(said))
