"""Rollout workers on a real local Ray: the same episodes, lost workers, whole runs, nothing left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_loop.conversation import Sampling, TokenActor
from agent_loop.episodes import episode_to_json
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episodes
from agent_loop.types import Completion, Episode, SamplingParams
from distill.config_load import load_config
from distill.environment import make_env
from distill.ray_cluster import WorkersError
from distill.ray_workers import MAX_TRIES, RayWorkers
from distill.sources import of_source
from envs.types import StopReason, Task
from tests.runs.conftest import TOOLS, Workplace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]

DEADLY = '''

@tool
def die() -> int:
    """Kill the process."""
    import os

    os.kill(os.getpid(), 9)
    return 0


@tool
async def hang() -> int:
    """Block the event loop for a minute."""
    import time

    time.sleep(60)
    return 0
'''

CALLS = {
    "add": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "die": '<tool_call>\n{"name": "die", "arguments": {}}\n</tool_call>',
    "hang": '<tool_call>\n{"name": "hang", "arguments": {}}\n</tool_call>',
}


class Writing:
    """A policy whose words depend on the episode alone: one call of the tool that the task is named after, then an
    answer. Each completion waits for `gate`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.gate = asyncio.Event()
        self.gate.set()
        self.keys: list[str] = []
        self._asked = asyncio.Condition()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        async with self._asked:
            self.keys.append(key)
            self._asked.notify_all()
        await self.gate.wait()
        call = CALLS[key.split("/")[-2].partition("-")[0]]
        tokenizer = self._renderer.tokenizer
        first = tokenizer.decode(list(prompt_ids)).count("<tool_call>") == 0
        ids = tokenizer.encode((call if first else f"done with {key}") + "<|im_end|>", add_special_tokens=False)
        return Completion(token_ids=tuple(ids), logprobs=(-0.5,) * len(ids), finish_reason="stop", policy_version=4)

    async def until_asked(self, count: int) -> None:
        async with self._asked, asyncio.timeout(60):
            await self._asked.wait_for(lambda: len(self.keys) >= count)

    async def aclose(self) -> None: ...


def jobs_of(*names: str) -> list[EpisodeJob]:
    return [
        EpisodeJob(task=Task(id=name, messages=({"role": "user", "content": f"use {name}"},)), step=3, seed=17)
        for name in names
    ]


def told(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Episodes without what a clock says."""
    values = []
    for episode in episodes:
        value = json.loads(json.dumps(episode_to_json(episode)))
        value.pop("timing")
        for turn in value["turns"]:
            turn.pop("sample_s"), turn.pop("env_s")
            for result in turn["tool_results"]:
                result.pop("duration_s")
        values.append(value)
    return values


@pytest.fixture
def flags(make: Callable[..., Workplace], models: Path) -> dict[str, Any]:
    """Settings of a place with tools that kill and hang."""
    place = make()
    (place.path / "adding" / "tools.py").write_text(TOOLS + DEADLY)
    return {
        "env": str(place.path / "adding"),
        "student.model": str(models / "student"),
        "teacher.model": str(models / "teacher"),
        "rollout.executor": "ray",
        "rollout.max_turn_tokens": 100,
        "rollout.max_turns": 3,
    }


@asynccontextmanager
async def started(flags: dict[str, Any], **options: Any) -> AsyncIterator[tuple[RayWorkers, Writing]]:
    renderer = load_renderer(flags["student.model"])
    config = load_config(overrides=flags).config
    logs = Path(flags["env"]).parent / "logs"
    workers = RayWorkers(config, flags["student.model"], renderer.fingerprint, logs=logs, **options)
    try:
        await workers.start()
        yield workers, Writing(renderer)
    finally:
        await workers.aclose()


async def play(workers: RayWorkers, policy: Writing, jobs: Sequence[EpisodeJob], **options: Any) -> list[Episode]:
    defaults = {"sampling": Sampling(max_context=900), "verify": False, "max_concurrent": 8}
    return await workers.play(jobs, policy=policy, **defaults | options)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


async def test_workers_play_what_this_process_plays(flags: dict[str, Any]) -> None:
    jobs = jobs_of(*(f"add-{i}" for i in range(6)))
    before = listening()
    flags |= {"rollout.curriculum.start": 1, "rollout.curriculum.every": 10}
    async with started(flags) as (workers, policy):
        hosts = {host for host, port in listening() - before}
        ended: list[str] = []
        there = await play(workers, policy, jobs, verify=True, on_episode=lambda e: ended.append(e.id))
        config = load_config(overrides=flags).config
        here = await run_episodes(
            jobs,
            make_env=lambda: make_env(config, verify=True),
            make_actor=lambda: TokenActor(load_renderer(flags["student.model"]), policy, Sampling(max_context=900)),
            max_concurrent=8,
        )
        (short,) = await play(workers, policy, jobs[:1], step=1)
        pids = workers.pids
        assert len(set(pids)) == 2
        assert os.getpid() not in pids
    assert told(there) == told(here)
    assert [len(e.turns) for e in there] == [2] * 6  # a call and an answer: there was something to compare
    assert len(short.turns) == 1  # the curriculum's first step
    assert sorted(ended) == sorted(job.id for job in jobs)
    wait_for(lambda: not any(map(alive, pids)))
    assert hosts == {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1: Ray's own servers too


async def test_an_episode_is_played_in_the_environment_of_its_source(flags: dict[str, Any]) -> None:
    other = Path(flags["env"]).with_name("other")
    shutil.copytree(flags["env"], other)
    flags |= {"sources.adding.share": 2.0, "sources.elsewhere.env": str(other), "rollout.ray.workers": 1}
    jobs = [
        replace(job, task=of_source(job.task, source))
        for job, source in zip(jobs_of("add-0", "add-1", "die-0"), ("adding", "elsewhere", "elsewhere"), strict=True)
    ]
    async with started(flags | {"rollout.ray.episodes_per_worker": 1}) as (workers, policy):
        episodes = await play(workers, policy, jobs, max_concurrent=1)
    assert [(e.id, e.env_id, e.task.source) for e in episodes] == [
        ("3/adding/add-0/0", "adding", "adding"),
        ("3/elsewhere/add-1/0", "other", "elsewhere"),
        ("3/elsewhere/die-0/0", "other", "elsewhere"),  # nobody played it: the record is the run's own
    ]
    assert [e.stop_reason is StopReason.ERROR for e in episodes] == [False, False, True]


async def test_a_worker_killed_in_mid_episode_is_replaced(flags: dict[str, Any]) -> None:
    jobs = jobs_of(*(f"add-{i}" for i in range(6)))
    async with started(flags) as (workers, policy):
        undisturbed = await play(workers, policy, jobs)
        policy.gate.clear()
        policy.keys.clear()
        ended: list[str] = []
        playing = asyncio.create_task(play(workers, policy, jobs, on_episode=lambda e: ended.append(e.id)))
        await policy.until_asked(6)  # all of them wait for their first turn
        before = workers.pids
        os.kill(before[0], signal.SIGKILL)
        await policy.until_asked(6 + 3)  # the three of the dead one again, in the other
        policy.gate.set()
        episodes = await playing
        await asyncio.to_thread(wait_for, lambda: len(workers.pids) == 2)
        assert set(workers.pids) - set(before)
        assert before[0] not in workers.pids
        again = await play(workers, policy, jobs)
    assert workers.num_lost == 1
    assert told(episodes) == told(undisturbed) == told(again)
    assert sorted(ended) == sorted(job.id for job in jobs)


async def test_an_episode_that_kills_every_worker_is_recorded_and_the_others_play(flags: dict[str, Any]) -> None:
    one_each = flags | {"rollout.ray.episodes_per_worker": 1}
    async with started(one_each) as (workers, policy):
        deadly, *others = await play(workers, policy, jobs_of("die-0", "add-0", "add-1"), max_concurrent=2)
        assert workers.num_lost == MAX_TRIES
    assert deadly.id == "3/die-0/0"
    assert deadly.stop_reason is StopReason.ERROR
    assert deadly.error is not None
    assert (deadly.error.boundary, deadly.error.kind) == ("worker", "WorkerDied")
    assert f"{MAX_TRIES} workers died" in deadly.error.message
    assert [e.stop_reason for e in others] == [StopReason.LAST_TOOL] * 2
    assert policy.keys.count("3/die-0/0") == MAX_TRIES


async def test_a_worker_that_hangs_is_ended_and_does_not_hold_the_others(flags: dict[str, Any]) -> None:
    brief = flags | {"rollout.timeout_s": 3.0, "rollout.ray.episodes_per_worker": 1}
    async with started(brief, grace_s=3.0) as (workers, policy):
        hung_pids = workers.pids
        began = time.monotonic()
        hung, *others = await play(workers, policy, jobs_of("hang-0", "add-0", "add-1"), max_concurrent=2)
        took = time.monotonic() - began
        assert workers.num_lost == 1
    assert hung.error is not None
    assert (hung.error.boundary, hung.error.kind) == ("worker", "Hung")
    assert [e.stop_reason for e in others] == [StopReason.LAST_TOOL] * 2
    assert took < 60, "the step waited for a tool that blocks for a minute"
    wait_for(lambda: not any(map(alive, hung_pids)))


async def test_an_outage_takes_no_time_of_an_episode(flags: dict[str, Any]) -> None:
    """The server is away from before the first turn until long after the episode's time."""
    async with started(flags | {"rollout.timeout_s": 3.0}) as (workers, policy):
        policy.gate.clear()
        began = time.monotonic()

        def away_s() -> float:
            return 0.0 if policy.gate.is_set() and not came_back else (came_back or time.monotonic()) - began

        came_back = 0.0
        playing = asyncio.create_task(play(workers, policy, jobs_of("add-0"), away_s=away_s))
        await asyncio.sleep(8)
        came_back = time.monotonic()
        policy.gate.set()
        (waited,) = await playing
        policy.gate.clear()
        (late,) = await play(workers, policy, jobs_of("add-1"))  # no outage: its clock runs
    assert waited.stop_reason is StopReason.LAST_TOOL
    assert late.stop_reason is StopReason.TIMEOUT


async def test_what_a_worker_cannot_play_is_told_before_anything_is_played(flags: dict[str, Any]) -> None:
    missing = flags | {"env": "./nowhere"}
    with pytest.raises(WorkersError, match=r"a worker cannot play './nowhere': on .*nowhere is not a folder") as caught:
        async with started(missing):
            pass
    assert "under the same paths" in str(caught.value)


async def test_another_tokenizer_is_refused(flags: dict[str, Any], models: Path) -> None:
    config = load_config(overrides=flags).config
    other = load_renderer(models / "stranger").fingerprint
    workers = RayWorkers(config, models / "student", other, logs=models)
    try:
        with pytest.raises(WorkersError, match=r"its tokenizer .*student is not the run's"):
            await workers.start()
    finally:
        await workers.aclose()


def listening() -> set[tuple[str, str]]:
    """Host and port, as the kernel writes them, of all listening TCP sockets."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                found.add(tuple(local.split(":")))
    return found  # type: ignore[return-value]


# Whole runs


def descendants(pid: int) -> set[int]:
    """All processes that a living one started, and those that these started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = set[int](), [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.add(child)
            waiting.append(child)
    return found


def ray_folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("ray-*")}


@pytest.fixture
def spawn(workplace: Workplace) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a run, which ends with the test."""
    runs = []

    def start(*flags: str) -> subprocess.Popen[bytes]:
        with (workplace.path / "stderr.txt").open("ab") as log:
            run = subprocess.Popen(
                workplace.command("--rollout.executor", "ray", *flags),
                cwd=workplace.path,
                env=workplace.environment(),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.kill()
        run.wait()


def test_a_whole_run_leaves_nothing_behind(workplace: Workplace, spawn: Callable[..., subprocess.Popen[bytes]]) -> None:
    folders = ray_folders()
    flags = ("--steps", "2", "--rollout.max_concurrent", "1", "--env", "./adding")  # relative to where the run starts
    run = spawn(*flags, "--run_id", "a", "--eval.at_end", "true")
    started: set[int] = set()
    while run.poll() is None:
        started |= descendants(run.pid)
        time.sleep(0.1)
    assert run.returncode == 0, (workplace.path / "stderr.txt").read_text()[-3000:]
    assert len(started) > 6  # the census saw Ray and its workers
    wait_for(lambda: not any(map(alive, started)), 10)
    assert ray_folders() <= folders
    workplace.run(*flags, "--run_id", "b", check=True)
    there, here = (workplace.lines(run_id, "episodes/step_000001.jsonl") for run_id in ("a", "b"))
    assert [e["id"] for e in there] == [e["id"] for e in here]
    assert len(there) == 6
    for one, other in zip(there, here, strict=True):  # before the first update: afterwards roundings differ
        for trace, same in zip(one["traces"], other["traces"], strict=True):
            assert trace["token_ids"] == same["token_ids"]
            scored = [v for v in trace["teacher_logprobs"] if v is not None]
            assert scored == pytest.approx([v for v in same["teacher_logprobs"] if v is not None], abs=1e-4)
            assert len(scored) == sum(trace["loss_mask"]) > 0
    ids = [[e["id"] for e in workplace.lines(run_id, "episodes/step_000002.jsonl")] for run_id in ("a", "b")]
    assert ids[0] == ids[1]


def until_first_step(run: subprocess.Popen[bytes], workplace: Workplace) -> set[int]:
    """Returns the processes that it has started."""
    metrics = workplace.path / "runs" / "a" / "metrics.jsonl"
    wait_for(lambda: run.poll() is not None or (metrics.exists() and metrics.read_text()), 240)
    assert run.poll() is None, (workplace.path / "stderr.txt").read_text()[-3000:]
    return descendants(run.pid)


def test_a_killed_run_takes_ray_with_it(workplace: Workplace, spawn: Callable[..., subprocess.Popen[bytes]]) -> None:
    folders = ray_folders()
    run = spawn("--steps", "1000", "--run_id", "a")
    started = until_first_step(run, workplace)
    assert len(started) > 6
    run.kill()
    run.wait()
    wait_for(lambda: not any(map(alive, started)), 60)
    wait_for(lambda: ray_folders() <= folders, 20)


def test_a_signal_lets_the_step_finish(workplace: Workplace, spawn: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Ray installs a handler of its own, which would end the run at once."""
    run = spawn("--steps", "1000", "--run_id", "a")
    started = until_first_step(run, workplace)
    run.terminate()
    assert run.wait(120) == 130, (workplace.path / "stderr.txt").read_text()[-3000:]
    assert "stopped after step" in (workplace.path / "stderr.txt").read_text()
    wait_for(lambda: not any(map(alive, started)), 10)


def test_without_ray_the_run_saves_and_exits(
    workplace: Workplace, spawn: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run = spawn("--steps", "100000", "--run_id", "a")
    started = until_first_step(run, workplace)
    (raylet,) = (pid for pid in started if b"raylet/raylet\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(raylet, signal.SIGKILL)
    assert run.wait(120) == 8, (workplace.path / "stderr.txt").read_text()[-3000:]
    steps = [line["step"] for line in workplace.lines("a")]
    assert (workplace.path / "runs" / "a" / "checkpoints" / f"step_{steps[-1]:06}" / "MANIFEST.json").exists()
    wait_for(lambda: not any(map(alive, started)), 10)
