"""The environments of a run, from its configuration alone: rollout workers make them where there is no model."""

from __future__ import annotations

from collections.abc import Callable

import envs
from agent_loop.conversation import Actor
from agent_loop.rollout import EpisodeJob, Stage, never_away
from agent_loop.types import Episode
from distill.config import RunConfig
from envs.tool_env import ToolEnv


def make_env(config: RunConfig, source: str = "", *, verify: bool, step: int | None = None) -> ToolEnv:
    """A fresh environment; a grader is built only with `verify`.

    Args:
        source: its name in `RunConfig.all_sources`.
        step: of training, for the curriculum.

    Raises:
        RegistryError: there is no such environment, or it cannot be made.
    """
    chosen = config.all_sources[source]
    return envs.make(
        chosen.env or config.env,
        limits=config.rollout.limits(step),
        skip_verification=not verify,
        **(chosen.env_args or {}),
    )


class Stages:
    """A stage for each source of a run: its environments play one episode after another.

    Args:
        verify, step: see `make_env`.
    """

    def __init__(self, config: RunConfig, *, verify: bool, step: int | None = None) -> None:
        def stage(source: str) -> Stage:
            return Stage(lambda: make_env(config, source, verify=verify, step=step))

        self._stages = {name: stage(name) for name in config.all_sources}

    async def play(self, job: EpisodeJob, actor: Actor, *, away_s: Callable[[], float] = never_away) -> Episode:
        """See `Stage.play`."""
        return await self._stages[job.task.source].play(job, actor, away_s=away_s)

    async def aclose(self) -> None:
        """Close the environments that play nothing."""
        for stage in self._stages.values():
            await stage.aclose()
