"""`python -m agent_loop.rollout`: how well does a model do on tasks? Plays episodes, trains nothing.

    python -m agent_loop.rollout --env medbrowse --model NAME --base-url http://localhost:8000/v1 --out eval/
    python -m agent_loop.rollout --env ./my_env --model gpt-x --base-url https://host/v1 --chat --out eval/

`--model` is the name that the server knows; `--tokenizer` the folder or hub id of its tokenizer (default: the model).
With `--chat` only messages are exchanged, so any OpenAI-compatible server will do, but no tokens are recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from agent_loop.types import Episode

EXIT_USAGE, EXIT_DATA, EXIT_SERVER = 2, 4, 5


@dataclass(frozen=True, slots=True)
class Summary:
    """What `--json` prints and `summary.json` holds. None: not computed."""

    model: str
    env: str
    episodes: int
    failed: int
    pass_at: dict[str, float]
    """`pass@1`, `pass@2` ...: chance that one of k episodes of a task succeeds (unbiased); empty without a grader."""
    stop_reasons: dict[str, float]
    turns: float | None
    tool_calls: float | None
    tool_errors: dict[str, float]
    """Share of all calls, by kind."""
    parse_errors: int
    sampled_tokens: float | None
    episode_tokens: float | None
    teacher_kl: float | None
    """Mean over sampled tokens of log p_student - log p_teacher, where a teacher was given."""


def summarise(episodes: Sequence[Episode], *, model: str, env: str, teacher_kl: float | None) -> Summary:
    """Numbers of many episodes; failed ones count as failures of their task."""
    played = [e for e in episodes if e.error is None]
    results = [r for e in played for t in e.turns for r in t.tool_results]
    errors = Counter(r.error.kind.value for r in results if r.error)
    sampled = [e.num_sampled for e in played if e.traces]
    return Summary(
        model=model,
        env=env,
        episodes=len(episodes),
        failed=len(episodes) - len(played),
        pass_at=pass_at(episodes),
        stop_reasons={
            reason: count / len(episodes)
            for reason, count in Counter(e.stop_reason.value for e in episodes).most_common()
        },
        turns=fmean(len(e.turns) for e in played) if played else None,
        tool_calls=fmean(sum(len(t.message.tool_calls) for t in e.turns) for e in played) if played else None,
        tool_errors={kind: count / len(results) for kind, count in errors.most_common()},
        parse_errors=sum(t.num_parse_errors for e in played for t in e.turns),
        sampled_tokens=fmean(sampled) if sampled else None,
        episode_tokens=fmean(sum(len(t) for t in e.traces) for e in played if e.traces) if sampled else None,
        teacher_kl=teacher_kl,
    )


def pass_at(episodes: Sequence[Episode]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4 ... up to the smallest group: 1 - C(n-c, k)/C(n, k), averaged over tasks (Chen et al.,
    arXiv:2107.03374, equation 1). Empty where nothing was graded."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        groups[episode.task.id].append((episode.reward or 0.0) >= 1.0)
    if all(episode.reward is None for episode in episodes):
        return {}
    smallest = min(map(len, groups.values()))
    found = {}
    k = 1
    while k <= smallest:
        found[f"pass@{k}"] = fmean(1.0 - math.comb(len(g) - sum(g), k) / math.comb(len(g), k) for g in groups.values())
        k *= 2
    return found


def table(summary: Summary) -> str:
    """The summary for a person."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    rows = [("model", summary.model), ("environment", summary.env)]
    rows.append(("episodes", f"{summary.episodes} ({summary.failed} failed)"))
    rows += [(name, f"{value:.1%}") for name, value in summary.pass_at.items()] or [("success", "no grader")]
    rows += [
        ("turns", number(summary.turns, "{:.2f}")),
        ("tool calls", number(summary.tool_calls, "{:.2f}")),
        ("malformed calls", str(summary.parse_errors)),
        ("sampled tokens", number(summary.sampled_tokens, "{:.1f}")),
        ("episode tokens", number(summary.episode_tokens, "{:.1f}")),
    ]
    if summary.teacher_kl is not None:
        rows.append(("teacher_kl", f"{summary.teacher_kl:.4f} nats a token"))
    rows += [(f"stopped: {reason}", f"{share:.1%}") for reason, share in summary.stop_reasons.items()]
    rows += [(f"tool error: {kind}", f"{share:.1%} of calls") for kind, share in summary.tool_errors.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


async def evaluate(arguments: argparse.Namespace) -> tuple[list[Episode], Summary]:
    """Play the episodes that the command line asks for."""
    import envs
    from agent_loop.chat_policy import ChatPolicy
    from agent_loop.conversation import Actor, MessageActor, Sampling, TokenActor
    from agent_loop.policy import VllmPolicy
    from agent_loop.renderer import load_renderer
    from agent_loop.rollout import EpisodeJob, run_episodes
    from agent_loop.transport import HttpTransport
    from envs.dataset import read_tasks
    from envs.types import Limits

    limits = Limits(max_turns=arguments.max_turns, max_turn_tokens=arguments.max_turn_tokens)

    def make_env() -> Any:
        return envs.make(arguments.env, limits=limits, skip_verification=arguments.no_grade, **arguments.env_args)

    env = make_env()
    if arguments.tasks:
        tasks = read_tasks(arguments.tasks, limit=arguments.num_tasks)
    else:
        tasks = list(env.default_tasks(split="eval", num_tasks=arguments.num_tasks))
    if not tasks:
        raise ValueError(f"environment {arguments.env!r} has no evaluation tasks of its own; give --tasks FILE")
    jobs = [
        EpisodeJob(task=task, sample_index=sample, seed=arguments.seed)
        for task in tasks
        for sample in range(arguments.samples)
    ]
    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
    if arguments.chat:
        model = ChatPolicy(arguments.base_url, arguments.model, api_key=key, temperature=arguments.temperature)

        def make_actor() -> Actor:
            return MessageActor(model)
    else:
        renderer = load_renderer(arguments.tokenizer or arguments.model)
        transport = HttpTransport(arguments.base_url, api_key=key)
        policy = VllmPolicy(transport, arguments.model)
        served = [entry["id"] for entry in (await transport.get_json("/v1/models", timeout_s=10.0))["data"]]
        if arguments.model not in served:
            raise ValueError(f"{arguments.base_url} does not serve {arguments.model!r}; it serves {', '.join(served)}")

        def make_actor() -> Actor:
            return TokenActor(renderer, policy, Sampling(temperature=arguments.temperature))

    def show(episode: Episode) -> None:
        print(f"\r{next(count)}/{len(jobs)} episodes", end="", file=sys.stderr, flush=True)

    count = iter(range(1, len(jobs) + 1))
    try:
        episodes = await run_episodes(
            jobs, make_env=make_env, make_actor=make_actor, max_concurrent=arguments.max_concurrent, on_episode=show
        )
    finally:
        print(file=sys.stderr)
        await (model.aclose() if arguments.chat else policy.aclose())
    kl = await teacher_kl(episodes, arguments) if arguments.teacher_base_url and not arguments.chat else None
    return episodes, summarise(episodes, model=arguments.model, env=arguments.env, teacher_kl=kl)


async def teacher_kl(episodes: Sequence[Episode], arguments: argparse.Namespace) -> float | None:
    """Score every trace with the teacher, keep the scores in the episodes, and return the mean sampled KL."""
    from agent_loop.scoring import prompt_logprobs
    from agent_loop.transport import HttpTransport

    transport = HttpTransport(arguments.teacher_base_url)
    gate = asyncio.Semaphore(16)
    gaps: list[float] = []

    async def score(episode: Episode) -> None:
        for trace in episode.traces:
            async with gate:
                scores = await prompt_logprobs(
                    transport, arguments.teacher_model or arguments.model, trace.token_ids, top_k=0, timeout_s=600.0
                )
            trace.teacher_logprobs = [
                value if trained else None for value, trained in zip(scores.logprobs, trace.loss_mask, strict=True)
            ]
            for student, teacher in zip(trace.sampling_logprobs, trace.teacher_logprobs, strict=True):
                if student is not None and teacher is not None:
                    gaps.append(student - teacher)

    try:
        await asyncio.gather(*(score(episode) for episode in episodes))
    finally:
        await transport.aclose()
    return fmean(gaps) if gaps else None


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 usage, 4 data, 5 the server is not there or serves something else."""
    parser = argparse.ArgumentParser(
        prog="python -m agent_loop.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--env", required=True, help="name or folder of the environment")
    add("--env-args", nargs="*", default=[], metavar="KEY=VALUE", help="constructor arguments, as TOML values")
    add("--model", required=True, help="the name that the server knows the model by")
    add("--base-url", required=True, help="OpenAI-compatible server, with /v1")
    add("--tokenizer", help="folder or hub id of the model's tokenizer (default: --model)")
    add(
        "--chat", action="store_true", help="speak messages only (any OpenAI-compatible server); no tokens are recorded"
    )
    add("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    add("--tasks", metavar="FILE", help="task JSONL (default: the environment's own evaluation tasks)")
    add("--num-tasks", type=int, metavar="N", help="the first N tasks")
    add("--samples", type=int, default=1, metavar="K", help="episodes a task (default: 1)")
    add("--temperature", type=float, default=1.0)
    add("--max-turns", type=int, default=10)
    add("--max-turn-tokens", type=int, default=1024)
    add("--max-concurrent", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--no-grade", action="store_true", help="do not grade: for environments without a grader")
    add("--teacher-base-url", metavar="URL", help="also score the episodes with this server: KL to a teacher")
    add("--teacher-model", metavar="NAME", help="name of the teacher on its server (default: --model)")
    add("--out", type=Path, metavar="DIR", help="write episodes.jsonl and summary.json there")
    add("--json", action="store_true", help="print the summary as JSON")
    arguments = parser.parse_args(argv)
    try:
        arguments.env_args = dict(_pair(text) for text in arguments.env_args)
    except ValueError as error:
        parser.error(str(error))
    return _guarded(arguments)


def _guarded(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from agent_loop.episodes import EpisodeWriter
    from agent_loop.renderer import RendererError
    from agent_loop.scoring import ScoringError
    from agent_loop.transport import TransportError
    from agent_loop.types import PolicyError
    from envs.jsonl import TaskError
    from envs.registry import RegistryError

    try:
        episodes, summary = asyncio.run(evaluate(arguments))
    except (RegistryError, RendererError, ValueError) as error:
        code = EXIT_DATA if isinstance(error, TaskError) else EXIT_USAGE
        print(f"error: {error}", file=sys.stderr)
        return code
    except (TransportError, PolicyError, ScoringError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SERVER
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        writer = EpisodeWriter(arguments.out / "episodes.jsonl")
        for episode in episodes:
            writer.append(episode)
        writer.close()
        (arguments.out / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    print(json.dumps(asdict(summary)) if arguments.json else table(summary))
    causes = Counter(f"{e.error.boundary}: {e.error.message[:200]}" for e in episodes if e.error)
    for cause, number in causes.most_common(3):
        print(f"failed {number}x: {cause}", file=sys.stderr)
    return EXIT_SERVER if causes and all(e.error for e in episodes) else 0


def _pair(text: str) -> tuple[str, Any]:
    """`key=value`; a value that is no TOML is a string."""
    key, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--env-args: {text!r} is not KEY=VALUE")
    try:
        return key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key, value
