"""The environment of a run, from its configuration alone: rollout workers make it where there is no model."""

from __future__ import annotations

import envs
from distill.config import RunConfig
from envs.tool_env import ToolEnv


def make_env(config: RunConfig, *, verify: bool, step: int | None = None) -> ToolEnv:
    """A fresh environment; a grader is built only with `verify`.

    Args:
        step: of training, for the curriculum.

    Raises:
        RegistryError: there is no such environment, or it cannot be made.
    """
    return envs.make(config.env, limits=config.rollout.limits(step), skip_verification=not verify, **config.env_args)
