"""The worker side of `distill.ray_workers`: one process, one event loop, many episodes.

Everything that goes in or out is a string of JSON. Ray wraps it in its own serialisation, and no object of this project
is ever pickled: the class is found by its name on the worker's machine, and what fails is told in words.
No model is loaded here, only its tokenizer.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.environment import Stages

PACKAGE = Path(__file__).resolve().parent


class EpisodeWorker:
    """Plays the episodes of one run.

    Args:
        setup: JSON object: `config` (a `RunConfig`), `model` (the student's tokenizer: folder or hub id), `folder` (the
            run's working folder), `gateway` (`base_url`, `key`).
    """

    def __init__(self, setup: str) -> None:
        self._setup: dict[str, Any] = json.loads(setup)
        self._stages: dict[str, Stages] = {}
        """By policy: environments live as long as one call of `RayWorkers.play`."""
        self._away_s: dict[str, float] = {}

    async def ready(self) -> str:
        """Load the tokenizer and make each source's environment once.

        Returns:
            JSON: `fingerprint` of the renderer, `env_ids` by source, `pid`; or the `problem`, in words.
        """
        try:
            return json.dumps(self._prepare())
        except Exception as error:
            return json.dumps({"problem": self._words(error)})

    async def play(self, job: str) -> str:
        """Play one episode.

        Args:
            job: JSON: `task`, `sample_index`, `step`, `seed`, `sampling`, `policy` (its name at the gateway), `away_s`
                so far; `verify` and `limits_of` (a step or null), the same for all jobs of a policy.

        Returns:
            JSON: the `episode`; or the `problem` where no environment can be made, in words.
        """
        from agent_loop.conversation import Sampling, TokenActor
        from agent_loop.episodes import episode_to_json, task_from_json
        from agent_loop.rollout import EpisodeJob
        from distill.gateway import GatewayPolicy

        asked = json.loads(job)
        name: str = asked["policy"]
        self.learn(name, asked["away_s"])
        played = EpisodeJob(
            task=task_from_json(asked["task"]),
            sample_index=asked["sample_index"],
            step=asked["step"],
            seed=asked["seed"],
        )
        actor = TokenActor(self._renderer, GatewayPolicy(self._transport, name), Sampling(**asked["sampling"]))
        try:
            stages = self._stages_of(name, verify=asked["verify"], step=asked["limits_of"])
            episode = await stages.play(played, actor, away_s=lambda: self._away_s[name])
            return json.dumps({"episode": episode_to_json(episode)}, allow_nan=False, separators=(",", ":"))
        except Exception as error:
            return json.dumps({"problem": f"episode {played.id!r}: {self._words(error)}"})

    async def away(self, policy: str, seconds: float) -> None:
        """Seconds so far in which this policy's servers were away; told anew while they are."""
        self.learn(policy, seconds)

    def learn(self, policy: str, seconds: float) -> None:
        """It only grows, and messages may overtake one another."""
        self._away_s[policy] = max(seconds, self._away_s.get(policy, 0.0))

    async def done(self, policy: str) -> None:
        """Nothing more is played with this policy: close its environments."""
        stages = self._stages.pop(policy, None)
        if stages is not None:
            await stages.aclose()

    async def aclose(self) -> None:
        """Close all environments that play nothing."""
        for stages in self._stages.values():
            await stages.aclose()
        await self._transport.aclose()

    def _prepare(self) -> dict[str, Any]:
        # Ray puts the folder of the program that called it on the path: our `types.py` is not Python's.
        sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != PACKAGE]
        folder = self._setup["folder"]
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths of the configuration mean what they mean to the run
        from agent_loop.renderer import load_renderer
        from distill.config import RunConfig
        from distill.environment import make_env
        from distill.gateway import connect

        self._config = RunConfig.model_validate_json(json.dumps(self._setup["config"]))
        self._renderer = load_renderer(self._setup["model"], enable_thinking=self._config.student.enable_thinking)
        self._transport = connect(**self._setup["gateway"])
        verify = not self._config.skip_verification
        env_ids = {name: make_env(self._config, name, verify=verify).env_id for name in self._config.all_sources}
        return {"fingerprint": self._renderer.fingerprint, "env_ids": env_ids, "pid": os.getpid()}

    def _stages_of(self, policy: str, *, verify: bool, step: int | None) -> Stages:
        from distill.environment import Stages

        if policy not in self._stages:
            self._stages[policy] = Stages(self._config, verify=verify, step=step)
        return self._stages[policy]

    def _words(self, error: Exception) -> str:
        folder = self._setup["folder"]
        lost = "" if os.path.isdir(folder) else f"; {folder}, where the run was started, is not on that machine"
        return f"on {platform.node()}: {type(error).__name__}: {error}{lost}"
