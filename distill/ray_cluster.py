"""The Ray that rollout workers live in: one that the run starts and ends, or one that is there."""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import RayConfig, RunConfig

OBJECT_STORE_BYTES = 200 << 20
"""Of a Ray of our own: episodes on their way; more goes to disk."""


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

    Without `rollout.ray.address` a Ray is started. It ends with the thread that started it, however that ends; its
    servers listen on loopback alone and take orders only from who has its token; its folder is this user's alone. There
    are no usage statistics and no dashboard.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._folder: Path | None = None
        self._ray: Any = None

    def join(self) -> Any:
        """Start or find Ray. Takes seconds and must be called in the main thread.

        Returns:
            The module `ray`.

        Raises:
            WorkersError: it does not start; there is no cluster, or none that takes this version and token; or the
                cluster has machines that cannot reach this one.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        options = {"address": self._config.address} if self._config.address is not None else self._own()
        # Ray takes SIGTERM for itself, at its import and again; it is the run that decides what a signal means.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            import ray

            ray.init(**options, log_to_driver=False, configure_logging=False)
        except Exception as error:
            where = f"rollout.ray.address: {self._config.address}" if self._config.address else "Ray cannot be started"
            raise WorkersError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._ray = ray
        self._refuse_if_out_of_reach()
        return ray

    def leave(self, logs: Path) -> None:
        """End the Ray that `join` started; leave one that was there. Idempotent.

        Args:
            logs: gets what the workers of our own Ray printed, if anything.
        """
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None
        if self._folder is not None:
            for file in self._folder.glob("ray/session_2*/logs/worker-*"):
                lines = file.read_text(errors="replace").splitlines(keepends=True)
                said = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
                if said:
                    logs.mkdir(parents=True, exist_ok=True)
                    (logs / f"worker-{file.name.rpartition('-')[2]}").write_text("".join(said))
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _own(self) -> dict[str, Any]:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Not what it is called after: 0 makes Ray take loopback for this machine's address, on every system.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        return {
            "address": "local",  # whatever RAY_ADDRESS says
            "num_cpus": math.ceil(self._config.workers * self._config.cpus),
            "num_gpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": str(self._folder / "ray"),
        }

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
