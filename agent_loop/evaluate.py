"""`python -m agent_loop.rollout`: how well does a model do on tasks? Plays episodes, trains nothing.

    python -m agent_loop.rollout --env medbrowse --model NAME --base-url http://localhost:8000/v1 --out eval/
    python -m agent_loop.rollout --env ./my_env --model gpt-x --base-url https://host/v1 --chat --out eval/

`--model` is the name that the server knows; `--tokenizer` the folder or hub id of its tokenizer (default: the model).
With `--chat` only messages are exchanged, so any OpenAI-compatible server will do, but no tokens are recorded.

Exit codes: 0 done; 2 the command is wrong; 4 the tasks or pages are; 5 the server is lost, does not serve the model, or
every episode failed; 7 the output cannot be written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from agent_loop.types import Episode, EpisodeError
from envs.types import Limits, StopReason, Task, TerminationPolicy

if TYPE_CHECKING:
    from agent_loop.conversation import Actor
    from agent_loop.episodes import EpisodeWriter
    from agent_loop.rollout import EpisodeJob
    from agent_loop.transport import Transport
    from envs.tool_env import ToolEnv

EXIT_USAGE, EXIT_DATA, EXIT_SERVER, EXIT_STORAGE, EXIT_INTERRUPT = 2, 4, 5, 7, 130
PROBE_S = 5.0
SCORE_S = 600.0
MAX_SCORED_AT_ONCE = 16


class UsageError(Exception):
    """The command cannot be done as it was given."""


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = make_parser()
    arguments = parsed(parser, argv)
    if arguments.teacher_base_url:
        if arguments.chat:
            parser.error("--teacher-base-url needs token ids, which --chat does not exchange")
        if (arguments.temperature, arguments.top_p, arguments.top_k) != (1.0, 1.0, 0):
            parser.error("--teacher-base-url: the KL is of samples at temperature 1, top-p 1 and top-k 0")
    return guarded(arguments)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of `add_play_arguments`, with `env_args` as values and `limits`; what is wrong ends the program."""
    arguments = parser.parse_args(argv)
    try:
        arguments.env_args = dict(_pair(text) for text in arguments.env_args)
        arguments.limits = Limits(
            max_turns=arguments.max_turns,
            max_turn_tokens=arguments.max_turn_tokens,
            max_episode_tokens=arguments.max_episode_tokens,
            timeout_s=arguments.timeout,
            termination_policy=arguments.termination_policy,
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.api_key_env and arguments.api_key_env not in os.environ:
        parser.error(f"--api-key-env: the environment has no variable {arguments.api_key_env}")
    return arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agent_loop.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_play_arguments(parser, tasks="evaluation")
    add = parser.add_argument
    add("--tokenizer", help="folder or hub id of the model's tokenizer (default: --model)")
    add(
        "--split", choices=("eval", "train"), default="eval",
        help="which of the environment's own tasks (default: eval); train: episodes to fine-tune on",
    )  # fmt: skip
    add("--chat", action="store_true", help="speak messages only; no tokens are recorded")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="0: off")
    add("--max-episode-tokens", type=int, metavar="N", help="prompt, tool output and sampled tokens together")
    add("--teacher-base-url", metavar="URL", help="also score the episodes: KL to a teacher of the same tokenizer")
    add("--teacher-model", metavar="NAME", help="name of the teacher on its server (default: --model)")
    add("--out", type=Path, metavar="DIR", help="write episodes.jsonl and summary.json there")
    return parser


def add_play_arguments(parser: argparse.ArgumentParser, *, tasks: str) -> None:
    """What is played, by whom, how long; `tasks` names the environment's own that are the default."""
    add = parser.add_argument
    add("--env", required=True, help="name or folder of the environment")
    add("--env-args", nargs="*", default=[], metavar="KEY=VALUE", help="constructor arguments, as TOML values")
    add("--model", required=True, help="the name that the server knows the model by")
    add("--base-url", required=True, help="OpenAI-compatible server, with /v1")
    add("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    add("--tasks", metavar="FILE", help=f"task JSONL (default: the environment's own {tasks} tasks)")
    add("--num-tasks", type=count, metavar="N", help="the first N tasks")
    add("--samples", "--group-size", type=count, default=1, metavar="K", help="episodes a task (default: 1)")
    add("--temperature", type=float, default=1.0)
    add("--max-turns", type=int, default=10)
    add("--max-turn-tokens", type=int, default=1024)
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one episode (default: 600)")
    add("--termination-policy", choices=get_args(TerminationPolicy), default="last_tool")
    add("--max-concurrent", type=count, default=32, help="episodes at once (default: 32)")
    add("--seed", type=int, default=0)
    add("--no-grade", action="store_true", help="do not grade")
    add("--json", action="store_true", help="print the summary as JSON")


def guarded(arguments: argparse.Namespace) -> int:
    """Evaluate; known failures become messages and exit codes, a bug stays a traceback."""
    from agent_loop.renderer import RendererError
    from agent_loop.scoring import ScoringError
    from agent_loop.transport import TransportError
    from agent_loop.types import PolicyError
    from envs.jsonl import TaskError
    from envs.registry import RegistryError
    from tools.pages import PageStoreError

    codes: list[tuple[tuple[type[BaseException], ...], int]] = [
        ((UsageError, RegistryError, RendererError), EXIT_USAGE),
        ((TaskError, PageStoreError), EXIT_DATA),
        ((TransportError, PolicyError, ScoringError), EXIT_SERVER),
        ((OSError,), EXIT_STORAGE),
        ((KeyboardInterrupt,), EXIT_INTERRUPT),
    ]
    try:
        episodes = asyncio.run(evaluate(arguments))
        return report(episodes, arguments)
    except (Exception, KeyboardInterrupt) as error:
        for kinds, code in codes:
            if isinstance(error, kinds):
                kept = (
                    f"; the episodes so far are in {arguments.out}" if code == EXIT_INTERRUPT and arguments.out else ""
                )
                print(f"error: {str(error) or 'interrupted'}{kept}", file=sys.stderr)
                return code
        raise


def report(episodes: Sequence[Episode], arguments: argparse.Namespace) -> int:
    """Print and write the summary; says what failed, most frequent first."""
    from agent_loop.summary import summarise, table

    summary = summarise(
        episodes, model=arguments.model, env=arguments.env, teacher=arguments.teacher_base_url is not None
    )
    text = json.dumps(asdict(summary), indent=2)
    if arguments.out:
        (arguments.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else table(summary))
    errors = [e.error for e in episodes if e.error]
    for (boundary, kind), number in Counter((e.boundary, e.kind) for e in errors).most_common(5):
        example = next(e.message for e in errors if (e.boundary, e.kind) == (boundary, kind))
        print(f"failed {number}x at {boundary} ({kind}): {example[:300]}", file=sys.stderr)
    nothing_scored = summary.unscored is not None and summary.unscored == summary.episodes - summary.failed
    return EXIT_SERVER if summary.failed == summary.episodes or nothing_scored else 0


async def evaluate(arguments: argparse.Namespace) -> list[Episode]:
    """Play the episodes that the command line asks for; each is written as soon as it is complete."""
    import envs
    from agent_loop.rollout import EpisodeJob
    from agent_loop.transport import HttpTransport

    def make_env() -> ToolEnv:
        return envs.make(
            arguments.env, limits=arguments.limits, skip_verification=arguments.no_grade, **arguments.env_args
        )

    jobs = [
        EpisodeJob(task=task, sample_index=sample, seed=arguments.seed)
        for task in await tasks_of(make_env, arguments, split=arguments.split)
        for sample in range(arguments.samples)
    ]
    async with AsyncExitStack() as opened:
        transport = HttpTransport(arguments.base_url, api_key=key_of(arguments))
        opened.push_async_callback(transport.aclose)
        make_actor = await _actor_maker(transport, arguments, opened)
        teacher = None
        if arguments.teacher_base_url:
            teacher = HttpTransport(arguments.teacher_base_url)
            opened.push_async_callback(teacher.aclose)
            await served(teacher, arguments.teacher_base_url, arguments.teacher_model or arguments.model)
        writer = _open(arguments.out)
        if writer is not None:
            opened.callback(writer.close)
        return await _played(jobs, make_env, make_actor, teacher, writer, arguments)


async def _played(
    jobs: Sequence[EpisodeJob],
    make_env: Callable[[], ToolEnv],
    make_actor: Callable[[], Actor],
    teacher: Transport | None,
    writer: EpisodeWriter | None,
    arguments: argparse.Namespace,
) -> list[Episode]:
    from agent_loop.rollout import run_episodes

    gate = asyncio.Semaphore(MAX_SCORED_AT_ONCE)
    scoring: list[asyncio.Task[None]] = []
    shown = Progress(len(jobs))

    def record(episode: Episode) -> None:
        if writer is not None:
            writer.append(episode)
        shown.advance()

    async def score_and_record(transport: Transport, episode: Episode) -> None:
        async with gate:
            await score(transport, arguments.teacher_model or arguments.model, episode)
        record(episode)

    def ended(episode: Episode) -> None:
        if teacher is None or episode.stop_reason is StopReason.ERROR:
            record(episode)
        else:
            scoring.append(asyncio.ensure_future(score_and_record(teacher, episode)))

    try:
        episodes = await run_episodes(
            jobs,
            make_env=make_env,
            make_actor=make_actor,
            max_concurrent=arguments.max_concurrent,
            on_episode=ended,
        )
        await asyncio.gather(*scoring)
    finally:
        for task in scoring:
            task.cancel()
        await asyncio.gather(*scoring, return_exceptions=True)
        shown.end()
    return episodes


async def score(transport: Transport, model: str, episode: Episode) -> None:
    """Put the teacher's log-probabilities into an episode, or why there are none."""
    from agent_loop.scoring import ScoringError, prompt_logprobs

    try:
        found = [
            await prompt_logprobs(transport, model, trace.token_ids, top_k=0, timeout_s=SCORE_S)
            for trace in episode.traces
        ]
    except ScoringError as error:
        episode.error = EpisodeError(boundary="teacher", kind=error.kind, message=str(error)[:2000])
        return
    for trace, scores in zip(episode.traces, found, strict=True):
        trace.teacher_logprobs = [
            value if trained else None for value, trained in zip(scores.logprobs, trace.loss_mask, strict=True)
        ]


async def served(transport: Transport, base_url: str, model: str) -> int | None:
    """Whether the server is there and knows the model; its context length where it says so.

    Raises:
        TransportError: no, and what there is.
    """
    from agent_loop.transport import TransportError

    reply = await transport.get_json("/v1/models", timeout_s=PROBE_S)
    cards = reply.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise TransportError(f"{base_url}/models lists no models: is it an OpenAI-compatible server?", "protocol")
    for card in cards:
        if card.get("id") == model:
            length = card.get("max_model_len")
            return length if type(length) is int else None
    names = ", ".join(str(card.get("id")) for card in cards) or "nothing"
    raise TransportError(f"{base_url} does not serve {model!r}; it serves {names}", "rejected")


async def _actor_maker(
    transport: Transport, arguments: argparse.Namespace, opened: AsyncExitStack
) -> Callable[[], Actor]:
    from agent_loop.conversation import MessageActor, Sampling, TokenActor
    from agent_loop.transport import TransportError

    if arguments.chat:
        from agent_loop.chat_policy import ChatPolicy

        try:  # many such APIs list their models in ways of their own; but one that is not there is soon found out
            await transport.get_json("/v1/models", timeout_s=PROBE_S)
        except TransportError as error:
            if error.kind == "unavailable":
                raise
        model = ChatPolicy(
            arguments.base_url, arguments.model, api_key=key_of(arguments), temperature=arguments.temperature
        )
        opened.push_async_callback(model.aclose)
        return lambda: MessageActor(model)
    from agent_loop.policy import VllmPolicy
    from agent_loop.renderer import load_renderer

    context = await served(transport, arguments.base_url, arguments.model)
    renderer = load_renderer(arguments.tokenizer or arguments.model)
    policy = VllmPolicy(transport, arguments.model)
    sampling = Sampling(
        temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k, max_context=context
    )
    return lambda: TokenActor(renderer, policy, sampling)


async def tasks_of(make_env: Callable[[], ToolEnv], arguments: argparse.Namespace, *, split: str) -> list[Task]:
    """The tasks to play, of a file or of the environment's own `split`; turns grading off where the environment has no
    grader.

    Raises:
        UsageError: there are none, or two of one id.
        TaskError: a row of the file is none.
    """
    from envs.dataset import read_tasks

    env = make_env()
    try:
        if arguments.tasks:
            tasks = read_tasks(arguments.tasks, limit=arguments.num_tasks)
        else:
            tasks = list(env.default_tasks(split=split, num_tasks=arguments.num_tasks))[: arguments.num_tasks]
        if not tasks:
            raise UsageError(f"environment {arguments.env!r} has no tasks of its own to play; give --tasks FILE")
        twice = [name for name, count in Counter(task.id for task in tasks).items() if count > 1]
        if twice:
            raise UsageError(f"two tasks of environment {arguments.env!r} have the id {twice[0]!r}")
        if not arguments.no_grade:
            try:
                env.grader()
            except NotImplementedError as error:
                print(f"not graded: {error}", file=sys.stderr)
                arguments.no_grade = True
    finally:
        await env.aclose()
    return tasks


def _open(out: Path | None) -> EpisodeWriter | None:
    """The writer of the output folder; episodes of another evaluation are not mixed with these."""
    from agent_loop.episodes import EpisodeWriter

    if out is None:
        return None
    path = out / "episodes.jsonl"
    if path.exists() and path.stat().st_size > 0:
        raise UsageError(f"{path} holds the episodes of another evaluation; choose another --out or remove it")
    return EpisodeWriter(path)


def key_of(arguments: argparse.Namespace) -> str | None:
    return os.environ[arguments.api_key_env] if arguments.api_key_env else None


class Progress:
    """One line that is written over on a terminal; elsewhere a line every tenth of the way."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._terminal = total, 0, sys.stderr.isatty()

    def advance(self) -> None:
        self._done += 1
        if self._terminal:
            print(f"\r{self._done}/{self._total} episodes", end="", file=sys.stderr, flush=True)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            print(f"{self._done}/{self._total} episodes", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal and self._done:
            print(file=sys.stderr)


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _pair(text: str) -> tuple[str, Any]:
    """`key=value`; a value that is no TOML is a string."""
    key, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--env-args: {text!r} is not KEY=VALUE")
    try:
        return key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key, value
