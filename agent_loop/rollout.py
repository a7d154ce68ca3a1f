"""Plays episodes: one (`run_episode`), or many at once (`run_episodes`).

A failure of one episode is data. It is classified once, where it happens (student, renderer, environment), recorded in
`Episode.error`, and never reaches its siblings. `python -m agent_loop.rollout` evaluates a model on tasks.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

from agent_loop.conversation import Actor, OutOfTokens
from agent_loop.renderer import RendererError
from agent_loop.types import Episode, EpisodeError, PolicyError, Turn
from envs.tool_env import ToolEnv
from envs.types import StopReason, Task

Boundary = Literal["student", "env", "renderer", "data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeJob:
    """One episode to play."""

    task: Task
    sample_index: int = 0
    """Which of the task's episodes of this step."""
    step: int = 0
    seed: int = 0
    """Of the run; request seeds are derived from it and from the episode's id."""

    @property
    def id(self) -> str:
        return f"{self.step}/{self.task.id}/{self.sample_index}"


class EpisodeFailure(Exception):
    """What ended an episode, and at which boundary."""

    def __init__(self, boundary: Boundary, error: BaseException) -> None:
        super().__init__(str(error))
        self.boundary = boundary
        self.error = error


@contextmanager
def boundary(name: Boundary) -> Iterator[None]:
    """Classify whatever is raised inside, once."""
    try:
        yield
    except (OutOfTokens, EpisodeFailure):
        raise
    except RendererError as error:
        raise EpisodeFailure("renderer", error) from error
    except PolicyError as error:
        if error.kind == "context_overflow":
            raise OutOfTokens(StopReason.CONTEXT_OVERFLOW) from error
        raise EpisodeFailure("student", error) from error
    except Exception as error:
        raise EpisodeFailure(name, error) from error


async def run_episode(job: EpisodeJob, env: ToolEnv, actor: Actor) -> Episode:
    """Play one episode to its end. Never raises for what a model, a tool or an environment did."""
    began = time.monotonic()
    episode = Episode(
        id=job.id, env_id=env.env_id, task=job.task, turns=[], traces=[], stop_reason=StopReason.ERROR, seed=job.seed
    )
    begun = False
    try:
        async with asyncio.timeout(env.limits.timeout_s):
            with boundary("env"):
                await env.areset(seed=_env_seed(job), options={"task": job.task})
            with boundary("renderer"):
                actor.begin(job.task, env.tool_specs, env.limits, key=job.id, seed=job.seed)
            begun = True
            while True:
                with boundary("student"):
                    turn = await actor.act()
                episode.turns.append(turn)
                stop = await _answer(env, actor, turn)
                if stop is not None:
                    episode.stop_reason = stop
                    break
            if not env.skip_verification:
                with boundary("env"):
                    episode.rewards = await env.verify()
    except OutOfTokens as out:
        episode.stop_reason = out.reason
        await _verify_cut(env, episode)
    except TimeoutError:
        episode.stop_reason = StopReason.TIMEOUT
        await _verify_cut(env, episode)
    except EpisodeFailure as failure:
        episode.stop_reason = StopReason.ERROR
        kind = failure.error.kind if isinstance(failure.error, PolicyError) else type(failure.error).__name__
        episode.error = EpisodeError(boundary=failure.boundary, kind=kind, message=str(failure.error)[:2000])
    if begun:
        episode.traces = actor.traces()
    _finish(episode, time.monotonic() - began)
    return episode


async def _answer(env: ToolEnv, actor: Actor, turn: Turn) -> StopReason | None:
    """Hand a turn to the environment and its answer to the actor; says why the episode ends, if it does."""
    began = time.monotonic()
    with boundary("env"):
        outcome = await env.astep(turn.message)
    turn.env_s = time.monotonic() - began
    turn.tool_results = outcome.info["tool_results"]
    turn.num_parse_errors = outcome.info["num_parse_errors"]
    if turn.num_parse_errors and env.limits.on_parse_error == "mask":
        actor.mask(turn)
    stop: StopReason | None = outcome.info["stop_reason"]
    if not turn.message.finished and stop not in (StopReason.ANSWERED, StopReason.PARSE_ERROR):
        stop = actor.cut_by(turn)  # a turn without its end is no answer
    if stop is not None:
        turn.observation = outcome.observation
        return stop
    with boundary("renderer"):
        turn.observation = actor.observe(turn, outcome.observation)
    return None


async def _verify_cut(env: ToolEnv, episode: Episode) -> None:
    """Grade an episode that a budget cut short: it may have succeeded at what was graded by then."""
    if env.skip_verification:
        return
    try:
        with boundary("env"):
            episode.rewards = await env.verify()
    except EpisodeFailure as failure:
        message = str(failure.error)[:2000]
        episode.error = EpisodeError(boundary="env", kind=type(failure.error).__name__, message=message)


def _finish(episode: Episode, total_s: float) -> None:
    if episode.rewards:
        episode.reward = episode.rewards.get("success", sum(episode.rewards.values()) / len(episode.rewards))
    versions = [turn.policy_version for turn in episode.turns if turn.policy_version is not None]
    episode.policy_version = min(versions, default=None)
    episode.timing = {
        "sample": sum(turn.sample_s for turn in episode.turns),
        "env": sum(turn.env_s for turn in episode.turns),
        "total": total_s,
    }


def _env_seed(job: EpisodeJob) -> int:
    from agent_loop.conversation import seed_of

    return seed_of(job.seed, job.id, -1)


async def run_episodes(
    jobs: Sequence[EpisodeJob],
    *,
    make_env: Callable[[], ToolEnv],
    make_actor: Callable[[], Actor],
    max_concurrent: int,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """Play many episodes, at most `max_concurrent` at once; each has an environment and an actor of its own.

    Args:
        on_episode: called as soon as an episode ends, in the order of the endings.

    Returns:
        The episodes in the order of the jobs.
    """
    done: dict[int, Episode] = {}
    queue = iter(enumerate(jobs))

    async def worker() -> None:
        async with _closing(make_env()) as env:
            actor = make_actor()
            for index, job in queue:
                episode = await run_episode(job, env, actor)
                done[index] = episode
                on_episode(episode)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(max_concurrent, len(jobs))):
            group.create_task(worker())
    return [done[index] for index in range(len(jobs))]


@asynccontextmanager
async def _closing(env: ToolEnv) -> AsyncIterator[ToolEnv]:
    try:
        yield env
    finally:
        await env.aclose()


if __name__ == "__main__":
    from agent_loop.evaluate import main

    sys.exit(main())
