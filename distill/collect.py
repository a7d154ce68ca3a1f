"""`python -m distill.collect`: any OpenAI-compatible model plays an environment; the episodes are kept to be imitated.

    python -m distill.collect --env medbrowse --model NAME --base-url https://host/v1 --api-key-env KEY --out collected/
    python -m distill.sft --episodes collected/ --student MODEL --out runs/sft

Only messages are exchanged, so nothing is asked of the server but chat completions. What is in the folder is not played
again: call it again to go on, with more tasks or a larger `--group-size` to add to it. An episode that failed is in
`failed.jsonl` and is played again by the next call.

Exit codes: as `python -m agent_loop.rollout`. A spent budget is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_loop.evaluate import (
    PROBE_S,
    Progress,
    UsageError,
    add_play_arguments,
    count,
    key_of,
    parsed,
    report,
    tasks_of,
)
from distill.failures import guarded

if TYPE_CHECKING:
    from agent_loop.chat_policy import ChatPolicy
    from agent_loop.rollout import EpisodeJob
    from agent_loop.types import Episode
    from envs.tool_env import ToolEnv

MIN_FAILED_IN_A_ROW = 8
"""So many failures, and as many as play at once, with no success between them: the rest would fail like them."""


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = parsed(make_parser(), argv)
    return guarded(lambda: asyncio.run(collect(arguments)))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_play_arguments(parser, tasks="training")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="episodes.jsonl is made or continued there")
    add("--max-episodes", type=count, metavar="N", help="play at most N this time")
    add(
        "--max-tokens", type=count, metavar="N",
        help="begin no episode once N prompt and completion tokens are spent this time, as the server counts them",
    )  # fmt: skip
    add(
        "--retry-s", type=float, default=120.0, metavar="SECONDS", help="ask a busy or lost server again (default: 120)"
    )
    parser.set_defaults(max_episode_tokens=None, teacher_base_url=None)
    return parser


async def collect(arguments: argparse.Namespace) -> None:
    """Play what is missing, record it, and say what is there.

    Raises:
        UsageError: the folder holds episodes of another environment or model; no tasks; a budget that cannot be kept.
        PolicyError: the server is lost, or fails every episode.
        TransportError: it cannot be reached.
    """
    import envs
    from agent_loop.chat_policy import ChatPolicy
    from agent_loop.rollout import EpisodeJob

    def make_env() -> ToolEnv:
        return envs.make(
            arguments.env, limits=arguments.limits, skip_verification=arguments.no_grade, **arguments.env_args
        )

    tasks = await tasks_of(make_env, arguments, split="train")
    await reachable(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    remember(arguments.out, origin(arguments))
    jobs = [
        EpisodeJob(task=task, sample_index=sample, seed=arguments.seed)
        for task in tasks
        for sample in range(arguments.samples)
    ]
    there = {episode.id for episode in episodes_in(arguments.out)}
    missing = [job for job in jobs if job.id not in there]
    model = ChatPolicy(
        arguments.base_url,
        arguments.model,
        api_key=key_of(arguments),
        temperature=arguments.temperature,
        retry_deadline_s=arguments.retry_s,
    )
    collector = Collector(arguments, model)
    try:
        await collector.play(missing[: arguments.max_episodes], make_env)
    finally:
        await model.aclose()
    there |= {episode.id for episode in collector.played}
    left = sum(job.id not in there for job in jobs)
    if collector.played or collector.failed or there:
        report([*episodes_in(arguments.out), *collector.failed], arguments)
    print(
        f"{len(collector.played)} episodes played, {len(collector.failed)} failed, {left} of {len(jobs)} missing; "
        f"{model.num_prompt_tokens:,} prompt and {model.num_completion_tokens:,} completion tokens spent"
        + (f"; stopped: {collector.stopped}" if collector.stopped else ""),
        file=sys.stderr,
    )
    collector.check()


class Collector:
    """Plays and records until all is played, a budget is spent, or everything fails."""

    def __init__(self, arguments: argparse.Namespace, model: ChatPolicy) -> None:
        self._arguments, self._model = arguments, model
        self.played: list[Episode] = []
        self.failed: list[Episode] = []
        self.stopped = ""
        """Why, if not because all was played."""
        self._failed_in_a_row = 0
        self._lost = False

    async def play(self, jobs: Sequence[EpisodeJob], make_env: Callable[[], ToolEnv]) -> None:
        """
        Raises:
            UsageError: there is a budget of tokens and the server does not count them.
        """
        from agent_loop.conversation import MessageActor
        from agent_loop.episodes import EpisodeWriter
        from agent_loop.rollout import run_episodes

        good, bad = (EpisodeWriter(self._arguments.out / name) for name in ("episodes.jsonl", "failed.jsonl"))
        shown = Progress(len(jobs))

        def ended(episode: Episode) -> None:
            (bad if episode.error else good).append(episode)
            self._count(episode)
            shown.advance()

        try:
            await run_episodes(
                jobs,
                make_env=make_env,
                make_actor=lambda: MessageActor(self._model),
                max_concurrent=self._arguments.max_concurrent,
                on_episode=ended,
                go_on=self._go_on,
            )
        finally:
            shown.end()
            good.close()
            bad.close()
        if not self.stopped and len(jobs) == self._arguments.max_episodes:
            self.stopped = f"--max-episodes {len(jobs)} are played"

    @property
    def _tokens(self) -> int:
        return self._model.num_prompt_tokens + self._model.num_completion_tokens

    def _count(self, episode: Episode) -> None:
        (self.failed if episode.error else self.played).append(episode)
        self._failed_in_a_row = self._failed_in_a_row + 1 if episode.error else 0
        if self._arguments.max_tokens is not None and episode.turns and not self._tokens:
            raise UsageError("--max-tokens cannot be kept: the server does not say how many tokens a reply took")

    def _go_on(self) -> bool:
        most = self._arguments.max_tokens
        if most is not None and self._tokens >= most:
            self.stopped = f"--max-tokens {most:,} are spent"
        elif self._failed_in_a_row >= max(MIN_FAILED_IN_A_ROW, self._arguments.max_concurrent):
            self.stopped, self._lost = f"the last {self._failed_in_a_row} episodes all failed", True
        return not self.stopped

    def check(self) -> None:
        """
        Raises:
            PolicyError: it was the server's fault that so little was played.
        """
        from agent_loop.types import PolicyError

        if self._lost or (self.failed and not self.played):
            error = self.failed[-1].error
            assert error is not None
            raise PolicyError(
                f"{self.stopped or 'every episode failed'}, the last at {error.boundary} ({error.kind}): "
                f"{error.message[:300]}; what was played is kept, call again to go on",
                "unavailable",
            )


def episodes_in(folder: Path) -> list[Episode]:
    """Those that did not fail."""
    from distill.demonstrations import recorded

    return list(recorded([folder])) if (folder / "episodes.jsonl").is_file() else []


def origin(arguments: argparse.Namespace) -> dict[str, Any]:
    """With what the episodes of a folder are played: the same for all of them."""
    from envs.registry import is_path

    limits = asdict(arguments.limits)
    del limits["timeout_s"]  # of this machine and this server
    return {
        "env": str(Path(arguments.env).expanduser().resolve()) if is_path(arguments.env) else arguments.env,
        "env_args": arguments.env_args,
        "model": arguments.model,
        "temperature": arguments.temperature,
        "limits": json.loads(json.dumps(limits)),
    }


def remember(folder: Path, now: Mapping[str, Any]) -> None:
    """Write `collect.json`, or hold it against what is there.

    Raises:
        UsageError: the folder's episodes were played with something else; naming the first key.
    """
    from distill.demonstrations import COLLECTED, origin_of
    from distill.rundir import write_json

    before = origin_of(folder)
    if not before:
        if episodes_in(folder):
            raise UsageError(f"{folder} holds episodes that distill.collect did not collect; choose another --out")
        write_json(folder / COLLECTED, now)
    for key, value in now.items():
        if before and before.get(key) != value:
            raise UsageError(
                f"{folder} was collected with {key} = {before.get(key)!r}, this is {value!r}; choose another --out"
            )


async def reachable(arguments: argparse.Namespace) -> None:
    """
    Raises:
        TransportError: nobody is there. Many such APIs list their models in ways of their own: that is no matter.
    """
    from agent_loop.transport import HttpTransport, TransportError

    transport = HttpTransport(arguments.base_url, api_key=key_of(arguments))
    try:
        await transport.get_json("/v1/models", timeout_s=PROBE_S)
    except TransportError as error:
        if error.kind == "unavailable":
            raise
    finally:
        await transport.aclose()


if __name__ == "__main__":
    sys.exit(main())
