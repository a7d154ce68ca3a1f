"""Rollout workers on Ray: environments and their browsers in other processes, here or on other machines.

    rollout.executor = "ray"
    rollout.ray = { workers = 8, episodes_per_worker = 16 }

A job goes out and an episode comes back, each as JSON text (Ray's serialisation carries strings, never objects of this
project). Workers sample through the run's gateway (`distill.gateway`); this process alone talks to the model servers,
scores, and writes files. A worker that died or hangs is replaced. What it played is played again, with the same id and
seed, or recorded as failed at the boundary `worker`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent_loop.conversation import Sampling
from agent_loop.episodes import episode_from_json, task_to_json
from agent_loop.rollout import CLOSE_S, MAX_MESSAGE_CHARS, EpisodeJob, clock, never_away, play_all
from agent_loop.types import Episode, EpisodeError, Policy
from distill.config import RunConfig
from distill.gateway import LOOPBACK, Gateway
from distill.ray_actor import EpisodeWorker
from distill.ray_cluster import RayCluster, WorkersError
from distill.serving.fleet import ServerLost
from envs.types import StopReason

MAX_TRIES = 3
"""Plays of one episode before it is recorded as failed; a neighbour may have taken the worker with it."""
MAX_FAILED_STARTS = 3
"""Replacements in a row that did not become ready before the run is told."""
START_S = 300.0
"""For a worker to import, load the tokenizer and make an environment, on a machine that may be busy."""
GRACE_S = 2 * CLOSE_S + 60.0
"""What an episode may take over its own time-outs, the closing of its environment included, before its worker counts as
hung."""
TELL_S = 1.0
"""Between two looks at whether the workers must be told of an outage."""
SPARE_CALLS = 4
"""Calls that a worker takes beside its episodes."""

_LOG = logging.getLogger(__name__)


class WorkersLost(ServerLost):
    """Workers died and no new ones came up. Like a lost server: the run saves and exits."""


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    """Ray's handle."""
    pid: int
    env_ids: dict[str, str]
    """By source."""
    playing: int = 0


class RayWorkers:
    """The workers of one run. Belongs to the event loop in which it is started, in the main thread.

    Args:
        model: folder or hub id of the student's tokenizer.
        fingerprint: of the student's renderer; a worker with another one would build other prompts.
        logs: see `RayCluster`.
        grace_s: see `GRACE_S`.
    """

    def __init__(
        self, config: RunConfig, model: str | Path, fingerprint: str, *, logs: Path, grace_s: float = GRACE_S
    ) -> None:
        self.num_lost = 0
        """Workers that died or hung since the start of the run."""
        self._config = config
        self._ray_config = config.rollout.ray
        self._model = str(model)
        self._fingerprint = fingerprint
        self._grace_s = grace_s
        self._cluster = RayCluster(self._ray_config, logs)
        self._gateway = Gateway(self._ray_config.host or LOOPBACK)
        self._workers: list[_Worker] = []
        self._changed = asyncio.Condition()
        self._chores: set[asyncio.Task[None]] = set()
        self._failed_starts = 0
        self._lost: WorkersLost | None = None
        self._ray: Any = None

    @property
    def pids(self) -> list[int]:
        """Of the workers that are up."""
        return [worker.pid for worker in self._workers]

    async def start(self) -> None:
        """Start or find Ray, and wait until every worker has made the environment.

        Raises:
            WorkersError: one cannot, or the cluster has machines that cannot reach this one.
        """
        self._ray = await self._cluster.join()
        try:
            await self._gateway.start()
        except OSError as error:
            raise WorkersError(f"rollout.ray.host: {self._ray_config.host} cannot be listened on: {error}") from error
        try:
            async with asyncio.TaskGroup() as group:
                hired = [group.create_task(self._hire()) for _ in range(self._ray_config.workers)]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        self._workers = [task.result() for task in hired]

    async def play(
        self,
        jobs: Sequence[EpisodeJob],
        *,
        policy: Policy,
        sampling: Sampling,
        verify: bool,
        max_concurrent: int,
        slots: asyncio.Semaphore | None = None,
        step: int | None = None,
        on_episode: Callable[[Episode], None] = lambda _: None,
        away_s: Callable[[], float] = never_away,
    ) -> list[Episode]:
        """`agent_loop.rollout.run_episodes`, in the workers.

        Args:
            policy: of this process; workers ask it through the gateway.
            verify: whether graders are on.
            step: of training, for the curriculum.

        Raises:
            WorkersError: a worker cannot make the environment.
            WorkersLost: no worker is left, and none can be started.
        """
        name = self._gateway.offer(policy)
        limit_s = self._config.rollout.timeout_s * (2 if verify else 1) + self._grace_s
        shared = {"policy": name, "verify": verify, "limits_of": step, "sampling": asdict(sampling)}

        async def play(job: EpisodeJob) -> Episode:
            return await self._play(job, shared, limit_s, away_s)

        teller = asyncio.create_task(self._tell(name, away_s))
        try:
            return await play_all(jobs, play, max_concurrent=max_concurrent, slots=slots, on_episode=on_episode)
        finally:
            teller.cancel()
            self._gateway.withdraw(name)
            for worker in self._workers:
                worker.actor.done.remote(name)

    async def aclose(self) -> None:
        """Close the workers' environments, end the workers, and Ray where it is ours; nothing of them is left."""
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * CLOSE_S):
                await asyncio.gather(*(w.actor.aclose.remote() for w in self._workers), return_exceptions=True)
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []
        await self._cluster.leave()
        await self._gateway.aclose()

    # --- one episode

    async def _play(
        self, job: EpisodeJob, shared: dict[str, Any], limit_s: float, away_s: Callable[[], float]
    ) -> Episode:
        from ray.exceptions import RayError, RayTaskError

        began = time.monotonic()
        why = ""
        for _ in range(MAX_TRIES):
            worker = await self._free()
            asked = _job_to_json(job) | shared | {"away_s": away_s()}
            reply = worker.actor.play.remote(json.dumps(asked, allow_nan=False))
            try:
                async with asyncio.timeout(None) as timeout:
                    with clock(timeout, limit_s, away_s):
                        return self._read(await reply)
            except TimeoutError:
                why = f"it did not end within {limit_s:g} s, long after its own time-outs"
                self._lose(worker, f"episode {job.id!r} hangs")
                return _failed(job, worker, "Hung", why, time.monotonic() - began)
            except RayTaskError:  # it ran and raised: a bug, of which a second try has no less
                raise
            except RayError as error:
                why = _words(error)
                self._lose(worker, why)
            except asyncio.CancelledError:
                self._ray.cancel(reply)
                raise
            finally:
                worker.playing -= 1
                await self._wake()
        why = f"{MAX_TRIES} workers died of it or beside it; {why}"
        return _failed(job, worker, "WorkerDied", why, time.monotonic() - began)

    def _read(self, reply: str) -> Episode:
        answer = json.loads(reply)
        if "problem" in answer:
            raise WorkersError(answer["problem"])
        return episode_from_json(answer["episode"])

    async def _free(self) -> _Worker:
        """The worker with the least to do, its place taken; waits for one.

        Raises:
            WorkersLost: there will be none.
        """

        def fit() -> list[_Worker]:
            return [w for w in self._workers if w.playing < self._ray_config.episodes_per_worker]

        async with self._changed:
            await self._changed.wait_for(lambda: self._lost is not None or fit())
            if self._lost is not None:
                raise self._lost
            worker = min(fit(), key=lambda w: w.playing)
            worker.playing += 1
            return worker

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _tell(self, policy: str, away_s: Callable[[], float]) -> None:
        """Keep the workers' clocks standing still while the servers are away."""
        told = away_s()
        while True:
            await asyncio.sleep(TELL_S)
            if away_s() != told:
                told = away_s()
                for worker in self._workers:
                    worker.actor.away.remote(policy, told)

    # --- workers

    async def _hire(self) -> _Worker:
        """
        Raises:
            WorkersError: it did not become ready.
        """
        from ray.exceptions import RayError

        setup = {
            "config": self._config.model_dump(mode="json"),
            "model": self._model,
            "folder": os.getcwd(),
            "gateway": {"base_url": self._gateway.base_url, "key": self._gateway.key},
        }
        options = {
            "num_cpus": self._ray_config.cpus,
            "max_concurrency": self._ray_config.episodes_per_worker + SPARE_CALLS,
            "max_restarts": 0,  # the run itself replaces it: what it played has to be played again
        }
        actor = self._ray.remote(EpisodeWorker).options(**options).remote(json.dumps(setup))
        try:
            async with asyncio.timeout(START_S):
                answer = json.loads(await actor.ready.remote())
        except TimeoutError:
            self._ray.kill(actor)
            raise WorkersError(
                f"a worker was not ready within {START_S:g} s; each wants rollout.ray.cpus = {self._ray_config.cpus:g} "
                f"of the cluster's {self._ray.cluster_resources().get('CPU', 0):g} cores"
            ) from None
        except RayError as error:
            raise WorkersError(f"a worker did not start: {_words(error)}") from error
        problem = answer.get("problem")
        if problem is None and answer["fingerprint"] != self._fingerprint:
            problem = f"its tokenizer {self._model} is not the run's: the files, or versions of packages, differ"
        if problem is not None:
            self._ray.kill(actor)
            envs = ", ".join(dict.fromkeys(repr(source.env) for source in self._config.all_sources.values()))
            raise WorkersError(
                f"a worker cannot play {envs}: {problem}. A machine of workers needs this project, the "
                "environment's folder or plug-in, its data and the tokenizer's folder under the same paths"
            )
        return _Worker(actor, answer["pid"], answer["env_ids"])

    def _lose(self, worker: _Worker, why: str) -> None:
        """Take a worker out, once, and see to another one."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        self.num_lost += 1
        _LOG.warning("a rollout worker (process %d) is lost and is replaced: %s", worker.pid, why)
        chore = asyncio.create_task(self._replace())
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _replace(self) -> None:
        while self._lost is None:
            try:
                if not self._cluster.alive():
                    self._lost = WorkersLost("Ray itself has died on this machine, and the rollout workers with it")
                    break
                worker = await self._hire()
            except Exception as error:  # whatever Ray raises where it is gone itself: somebody waits for this worker
                self._failed_starts += 1
                _LOG.warning("a new rollout worker did not start: %s", error)
                if self._failed_starts >= MAX_FAILED_STARTS:
                    self._lost = WorkersLost(f"a rollout worker died, and {self._failed_starts} others failed: {error}")
            else:
                self._failed_starts = 0
                self._workers.append(worker)
                break
        await self._wake()


def _words(error: Exception) -> str:
    """What Ray says, without its advice."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition(' Some common causes')[0]}"


def _job_to_json(job: EpisodeJob) -> dict[str, Any]:
    return {"task": task_to_json(job.task), "sample_index": job.sample_index, "step": job.step, "seed": job.seed}


def _failed(job: EpisodeJob, worker: _Worker, kind: str, message: str, total_s: float) -> Episode:
    """The record of an episode that no worker could end."""
    return Episode(
        id=job.id,
        env_id=worker.env_ids[job.task.source],
        task=job.task,
        turns=[],
        traces=[],
        stop_reason=StopReason.ERROR,
        error=EpisodeError(boundary="worker", kind=kind, message=message[:MAX_MESSAGE_CHARS]),
        seed=job.seed,
        timing={"sample": 0.0, "env": 0.0, "total": total_s},
    )
