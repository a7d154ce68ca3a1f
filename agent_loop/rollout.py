"""Plays episodes: one (`run_episode`), or many at once (`run_episodes`).

A failure of one episode is data. It is classified once, where it happens (student, renderer, tool, environment),
recorded in `Episode.error`, and never reaches its siblings. `python -m agent_loop.rollout` evaluates a model on tasks.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent_loop.conversation import Actor, OutOfTokens, seed_of
from agent_loop.renderer import RendererError
from agent_loop.types import Episode, EpisodeError, PolicyError, Turn
from envs.tool_env import ToolEnv
from envs.types import StopReason, Task
from tools.schema import ToolContractError

Boundary = Literal["student", "env", "tool", "renderer"]

MAX_MESSAGE_CHARS = 2000
CLOSE_S = 30.0
"""How long an environment may take to close."""
LOOK_S = 0.05
"""The shortest time between two looks at an episode's clock."""


def always() -> bool:
    """The `go_on` of those who play all."""
    return True


def never_away() -> float:
    """The `away_s` of a server whose outages count against the episodes."""
    return 0.0


_LOG = logging.getLogger(__name__)


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

    def __init__(self, boundary: Boundary, error: Exception) -> None:
        super().__init__(str(error))
        self.boundary = boundary
        self.error = error

    def record(self) -> EpisodeError:
        kind = self.error.kind if isinstance(self.error, PolicyError) else type(self.error).__name__
        return EpisodeError(boundary=self.boundary, kind=kind, message=str(self.error)[:MAX_MESSAGE_CHARS])


@contextmanager
def boundary(name: Boundary) -> Iterator[None]:
    """Classify whatever is raised inside, once. Cancellation and interrupts pass."""
    try:
        yield
    except OutOfTokens:
        raise
    except RendererError as error:
        raise EpisodeFailure("renderer", error) from error
    except ToolContractError as error:
        raise EpisodeFailure("tool", error) from error
    except PolicyError as error:
        if error.kind == "context_overflow":
            raise OutOfTokens(StopReason.CONTEXT_OVERFLOW) from error
        raise EpisodeFailure("student", error) from error
    except Exception as error:
        raise EpisodeFailure(name, error) from error


# One episode


async def run_episode(
    job: EpisodeJob, env: ToolEnv, actor: Actor, *, away_s: Callable[[], float] = never_away
) -> Episode:
    """Play one episode to its end, and grade it where verification is on.

    Never raises for what a model, a tool or an environment did. `Limits.timeout_s` cancels whatever is being waited
    for; code that blocks the event loop cannot be cancelled.

    Args:
        away_s: seconds so far in which the model could not be had (`Fleet.away_s`); the episode's clock stands still
            meanwhile.
    """
    began = time.monotonic()
    episode = Episode(
        id=job.id, env_id=env.env_id, task=job.task, turns=[], traces=[], stop_reason=StopReason.ERROR, seed=job.seed
    )
    try:
        try:
            async with asyncio.timeout(None) as timeout:
                with clock(timeout, env.limits.timeout_s, away_s):
                    episode.stop_reason = await _play(job, env, actor, episode)
        except OutOfTokens as out:
            episode.stop_reason = out.reason
        except TimeoutError:
            episode.stop_reason = StopReason.TIMEOUT
        if not env.skip_verification:
            episode.rewards = await _grade(env)
    except EpisodeFailure as failure:
        episode.stop_reason = StopReason.ERROR
        episode.error = failure.record()
    try:
        with boundary("env"):
            episode.metadata = env.episode_metadata()
    except EpisodeFailure as failure:
        episode.stop_reason, episode.error = StopReason.ERROR, failure.record()
    _finish(episode, actor, time.monotonic() - began)
    return episode


@contextmanager
def clock(timeout: asyncio.Timeout, limit_s: float, away_s: Callable[[], float]) -> Iterator[None]:
    """Let `timeout` expire after `limit_s` by a clock that stands still while the model is away."""
    loop = asyncio.get_running_loop()
    began = loop.time() - away_s()
    handle: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal handle
        left = limit_s - (loop.time() - away_s() - began)
        if left > 0:
            handle = loop.call_later(max(left, LOOK_S), look)
        else:
            timeout.reschedule(loop.time())

    handle = loop.call_later(limit_s, look)
    try:
        yield
    finally:
        handle.cancel()


async def _play(job: EpisodeJob, env: ToolEnv, actor: Actor, episode: Episode) -> StopReason:
    """Reset, then act, step and record until the environment or a budget says why to stop."""
    with boundary("env"):
        messages, _ = await env.areset(seed=seed_of(job.seed, job.id, -1), options={"task": job.task})
        tools = env.tool_specs
    if messages != job.task.messages:  # the environment has its own opening: the record is of what was played
        episode.task = replace(job.task, messages=tuple(messages))
    with boundary("renderer"):
        actor.begin(messages, tools, env.limits, key=job.id, seed=job.seed)
    while True:
        with boundary("student"):
            turn = await actor.act()
        episode.turns.append(turn)
        stop = await _step(env, actor, turn)
        if stop is not None:
            return stop


async def _step(env: ToolEnv, actor: Actor, turn: Turn) -> StopReason | None:
    """Hand a turn to the environment and its answer to the actor; says why the episode ends, if it does."""
    began = time.monotonic()
    with boundary("env"):
        outcome = await env.astep(turn.message)
        stop: StopReason | None = outcome.info["stop_reason"]
        turn.tool_results = outcome.info["tool_results"]
        turn.num_parse_errors = outcome.info["num_parse_errors"]
    turn.env_s = time.monotonic() - began
    if turn.num_parse_errors and env.limits.on_parse_error == "mask":
        actor.mask(turn)
    if not turn.message.finished and stop not in (StopReason.ANSWERED, StopReason.PARSE_ERROR):
        stop = actor.cut_by(turn)  # a turn without its end is no answer
    if stop is not None:
        turn.observation = outcome.observation
        return stop
    with boundary("renderer"):
        turn.observation = actor.observe(turn, outcome.observation)
    return None


async def _grade(env: ToolEnv) -> dict[str, float]:
    """What the graders say, also of an episode that a budget cut short: it may have succeeded by then."""
    with boundary("env"):
        async with asyncio.timeout(env.limits.timeout_s):
            return _checked(await env.verify())


def _checked(rewards: Any) -> dict[str, float]:
    """A grader's numbers, as an episode file can hold them."""
    if not isinstance(rewards, Mapping):
        raise TypeError(f"verify must return a dict of rewards by name, found {type(rewards).__name__}")
    for name, value in rewards.items():
        if not isinstance(name, str) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"verify must return finite numbers by name, found {name!r}: {value!r}")
    return {name: float(value) for name, value in rewards.items()}


def _finish(episode: Episode, actor: Actor, total_s: float) -> None:
    episode.traces = actor.traces()
    if episode.rewards:
        episode.reward = episode.rewards.get("success", sum(episode.rewards.values()) / len(episode.rewards))
    versions = [turn.policy_version for turn in episode.turns if turn.policy_version is not None]
    episode.policy_version = min(versions, default=None)
    episode.timing = {
        "sample": sum(turn.sample_s for turn in episode.turns),
        "env": sum(turn.env_s for turn in episode.turns),
        "total": total_s,
    }


# Many episodes


class Stage:
    """Environments that play one episode after another; one in which an episode failed or timed out is closed.

    Args:
        make_env: a fresh environment; called when all that there are play.
    """

    def __init__(self, make_env: Callable[[], ToolEnv]) -> None:
        self._make_env = make_env
        self._idle: list[ToolEnv] = []

    async def play(self, job: EpisodeJob, actor: Actor, *, away_s: Callable[[], float] = never_away) -> Episode:
        """`run_episode` in an environment that no other episode has meanwhile."""
        env = self._idle.pop() if self._idle else self._make_env()
        fit = False
        try:
            episode = await run_episode(job, env, actor, away_s=away_s)
            fit = episode.stop_reason not in (StopReason.ERROR, StopReason.TIMEOUT)
        finally:
            if fit:
                self._idle.append(env)
            else:
                await _close(env)
        return episode

    async def aclose(self) -> None:
        """Close the environments that play nothing."""
        idle, self._idle = self._idle, []
        for env in idle:
            await _close(env)


async def run_episodes(
    jobs: Sequence[EpisodeJob],
    *,
    make_env: Callable[[], ToolEnv],
    make_actor: Callable[[], Actor],
    max_concurrent: int,
    slots: asyncio.Semaphore | None = None,
    on_episode: Callable[[Episode], None] = lambda _: None,
    go_on: Callable[[], bool] = always,
    away_s: Callable[[], float] = never_away,
) -> list[Episode]:
    """Play many episodes in this process; each has an environment (`Stage`) and an actor of its own.

    Args:
        max_concurrent, slots, on_episode, go_on: see `play_all`.
        away_s: see `run_episode`.

    Returns:
        The episodes that were played, in the order of the jobs.

    Raises:
        ValueError: `max_concurrent` below 1, or two jobs of one id.
        Exception: what `make_env`, `make_actor` or `on_episode` raised; the episodes that still run are cancelled.
    """
    stage = Stage(make_env)

    async def play(job: EpisodeJob) -> Episode:
        return await stage.play(job, make_actor(), away_s=away_s)

    try:
        return await play_all(
            jobs, play, max_concurrent=max_concurrent, slots=slots, on_episode=on_episode, go_on=go_on
        )
    finally:
        await stage.aclose()


async def play_all(
    jobs: Sequence[EpisodeJob],
    play: Callable[[EpisodeJob], Awaitable[Episode]],
    *,
    max_concurrent: int,
    slots: asyncio.Semaphore | None = None,
    on_episode: Callable[[Episode], None] = lambda _: None,
    go_on: Callable[[], bool] = always,
) -> list[Episode]:
    """Play every job, at most `max_concurrent` at once, begun in their order.

    Args:
        slots: one more bound, shared with other calls that run meanwhile: an episode begins when it gets a slot.
        on_episode: called as soon as an episode ends, in the order of the endings.
        go_on: asked before each episode; once it says no, those at play are ended and no other begins.

    Returns:
        The episodes that were played, in the order of the jobs.

    Raises:
        ValueError: `max_concurrent` below 1, or two jobs of one id.
        Exception: what `play` or `on_episode` raised; what still runs is cancelled.
    """
    if max_concurrent < 1:
        raise ValueError(f"max_concurrent must be at least 1, got {max_concurrent}")
    twice = [name for name, count in Counter(job.id for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"two jobs have the id {twice[0]!r}: number the samples of a task")
    done: dict[int, Episode] = {}
    queue = iter(enumerate(jobs))

    async def player() -> None:
        for index, job in queue:
            async with slots or nullcontext():
                if not go_on():
                    return
                done[index] = episode = await play(job)
            on_episode(episode)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max_concurrent, len(jobs))):
                group.create_task(player())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the first: the others are its consequence or its like
    return [done[index] for index in sorted(done)]


async def _close(env: ToolEnv) -> None:
    """Close an environment; if it cannot be closed, that is its own loss and nobody's episode."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await env.aclose()
    except Exception as error:
        _LOG.warning("environment %r did not close: %s: %s", env.env_id, type(error).__name__, error)


if __name__ == "__main__":
    from agent_loop.evaluate import main

    sys.exit(main())
