"""Forks of a run's episodes: environment, tokenizer and sampling are the run's; forks lie beside the originals.

what_if = WhatIf(run, tokenizer_folder, model=Model(base_url, name))
episode = what_if.fork(original, 3, folder, "...")     # without a text the model samples turn 3 anew
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_loop.conversation import Sampling
from agent_loop.types import Episode, Policy
from agent_loop.view.fork import ForkError, fork
from agent_loop.view.rows import FORKS, Row, cut, exact
from envs.types import Limits

if TYPE_CHECKING:
    from agent_loop.renderer import Renderer
    from agent_loop.view.index import Index


@dataclass(frozen=True, slots=True)
class Model:
    """A server of token ids that samples on. Its ids must be those of the run's tokenizer."""

    base_url: str
    name: str
    api_key: str | None = None


class WhatIf:
    """Forks of one run's episodes.

    Args:
        run: the run's folder; its `config.json` says environment, limits and sampling.
        tokenizer: folder of the run's tokenizer.
        model: samples on; None: an edited turn is the last.
        env: environment to use; needed where the run's is a folder, whose code runs only if the command names it. Of a
            run of several sources, for those whose environment is a folder.

    Raises:
        ForkError: the run's configuration cannot be read, or names a folder.
    """

    def __init__(
        self, run: Path, tokenizer: Path | None, *, model: Model | None = None, env: str | None = None
    ) -> None:
        path = run / "config.json"
        try:
            config = json.loads(path.read_bytes())
            rollout = config["rollout"]
            self._limits = Limits(**{f.name: rollout[f.name] for f in fields(Limits) if f.name in rollout})
            self._sampling = {name: rollout[name] for name in ("temperature", "top_p", "top_k") if name in rollout}
            self._verify = not config.get("skip_verification", True)
            own = (str(config["env"]), dict(config.get("env_args") or {}))
            self._played_in = {"": own}
            for name, source in (config.get("sources") or {}).items():
                args = source.get("env_args")
                its_args = dict(args) if args is not None else {} if source.get("env") else own[1]
                self._played_in[name] = (str(source.get("env") or own[0]), its_args)
            self._thinking = (config.get("student") or {}).get("enable_thinking")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ForkError(
                f"{path} does not say how the episodes were played: {type(error).__name__}: {error}; --what-if wants "
                "the folder of a training run"
            ) from None
        self._given_env = env
        if not config.get("sources"):
            self._environment("")
        if tokenizer is None:
            raise ForkError(f"the tokenizer of {run} was not found: name its folder with --tokenizer")
        self.model = model
        self._tokenizer = tokenizer
        self._renderer: Renderer | None = None

    def _environment(self, source: str) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the environment in which a source's episodes are played again.

        Raises:
            ForkError: there is no such source, or its environment is a folder that the command does not name.
        """
        from envs.registry import is_path

        if source not in self._played_in:
            raise ForkError(f"the run's config.json has no source {source!r}, which the episode was drawn from")
        env, args = self._played_in[source]
        if is_path(env) and self._given_env is None:
            raise ForkError(f"the run's environment is the folder {env}: its code runs if you add --env {env}")
        if isinstance(args.get("browse"), dict):
            args = args | {"browse": args["browse"] | {"mode": "replay"}}  # never the network
        alone = len(self._played_in) == 1
        return self._given_env if self._given_env is not None and (alone or is_path(env)) else env, args

    def fork(self, original: Episode, turn: int, folder: Path, edited_text: str | None = None) -> Episode:
        """Play a fork and append it to the forks in `folder`.

        Raises:
            ForkError, ReplayDiffers: as in `agent_loop.view.fork.fork`; the environment or the model cannot be had.
        """
        from agent_loop.episodes import EpisodeWriter, read_episodes

        path = folder / FORKS
        if path.is_symlink():
            raise ForkError(f"{path} is a link: forks are not written through it")
        taken = {item.id for item in read_episodes(path) if isinstance(item, Episode)} if path.exists() else set()
        number = 1
        while f"{original.id}#fork-{number}" in taken:
            number += 1
        episode = asyncio.run(self._play(original, turn, edited_text, f"{original.id}#fork-{number}"))
        try:
            writer = EpisodeWriter(path)
            try:
                writer.append(episode)
            finally:
                writer.close()
        except (OSError, ValueError) as error:
            raise ForkError(f"the fork could not be stored: {error}") from error
        return episode

    async def _play(self, original: Episode, turn: int, edited_text: str | None, fork_id: str) -> Episode:
        import envs
        from agent_loop.renderer import RendererError, load_renderer
        from agent_loop.transport import TransportError
        from envs.registry import RegistryError
        from envs.tool_env import EnvSetupError
        from tools.pages import PageStoreError

        try:
            if self._renderer is None:
                self._renderer = load_renderer(self._tokenizer, enable_thinking=self._thinking)
            async with AsyncExitStack() as opened:
                policy, context = await self._policy(opened)
                name, args = self._environment(original.task.source)
                env = envs.make(name, limits=self._limits, skip_verification=not self._verify, **args)
                opened.push_async_callback(env.aclose)
                how = [] if edited_text is None else ["edited"]
                how += [] if self.model is None else [f"sampled by {self.model.name}"]
                return await fork(
                    original,
                    turn,
                    fork_id=fork_id,
                    env=env,
                    renderer=self._renderer,
                    policy=policy,
                    sampling=Sampling(**self._sampling, max_context=context),
                    edited_text=edited_text,
                    how=", then ".join(how),
                )
        except (RegistryError, EnvSetupError, PageStoreError, RendererError, TransportError) as error:
            raise ForkError(str(error)) from error

    async def _policy(self, opened: AsyncExitStack) -> tuple[Policy | None, int | None]:
        if self.model is None:
            return None, None
        from agent_loop.evaluate import served
        from agent_loop.policy import VllmPolicy
        from agent_loop.transport import HttpTransport

        transport = HttpTransport(self.model.base_url, api_key=self.model.api_key)
        opened.push_async_callback(transport.aclose)
        context = await served(transport, self.model.base_url, self.model.name)
        return VllmPolicy(transport, self.model.name), context


def fork_row(index: Index, row: Row, what_if: WhatIf, turn: int, text: str | None) -> Row:
    """Fork the episode of a row, and store the fork; its row.

    Raises:
        ForkError: it cannot be done.
        ValueError, RecursionError: the line is no episode.
        FileNotFoundError: the file is gone.
    """
    from agent_loop.episodes import episode_from_json

    original = episode_from_json(exact(index.raw(row)))
    episode = what_if.fork(original, turn, index.path(row).parent, text)
    index.refresh()
    found = [r for r in index.rows() if (r.run, r.file, r.id) == (row.run, FORKS, cut(episode.id))]
    if not found:
        raise ForkError("the fork was written, but is not among the run's episodes")
    return found[-1]
