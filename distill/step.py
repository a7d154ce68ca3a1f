"""Hops 1 to 5 of a training step: tasks in, scored episodes out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent_loop.conversation import Sampling, TokenActor
from agent_loop.episodes import EpisodeWriter
from agent_loop.policy import VllmPolicy
from agent_loop.rollout import EpisodeJob, run_episodes
from agent_loop.types import Episode, EpisodeError
from distill.build import Parts
from distill.endpoints import Endpoint
from distill.metrics import Metrics, rollout_metrics
from distill.rundir import RunDir
from distill.types import TeacherError
from envs.types import StopReason, Task


class TooManyDropped(Exception):
    """More scores are missing than `teacher.max_dropped_fraction` allows, or every episode failed."""


@dataclass(slots=True)
class ScoredStep:
    """The episodes of one step, in the order of the jobs."""

    episodes: list[Episode]
    """All of them, failed ones too."""
    trainable: list[Episode]
    """Those with a teacher score for every trained token."""
    metrics: Metrics
    dropped: Counter[str] = field(default_factory=Counter)
    """Episodes that played but got no score, by the kind of the teacher's error."""


def jobs_for(tasks: Sequence[Task], *, group_size: int, step: int, seed: int) -> list[EpisodeJob]:
    """`group_size` episodes a task, with ids and seeds that only (seed, step, task, sample) decide. A task that is
    there twice (a batch that runs over into the next epoch) gets more samples."""
    samples: Counter[str] = Counter()
    jobs = []
    for task in tasks:
        first = samples[task.id]
        samples[task.id] += group_size
        jobs += [EpisodeJob(task=task, sample_index=first + i, step=step, seed=seed) for i in range(group_size)]
    return jobs


async def collect(
    parts: Parts, run: RunDir, tasks: Sequence[Task], step: int, *, on_episode: Callable[[], None] = lambda: None
) -> ScoredStep:
    """Play the step's episodes, score each as soon as it ends, and record all of them.

    Raises:
        TooManyDropped: nothing would be left to train on, or too little.
    """
    config = parts.config
    jobs = jobs_for(tasks, group_size=config.rollout.group_size, step=step, seed=config.seed)
    scoring: list[asyncio.Task[None]] = []
    writer = EpisodeWriter(run.episodes_file(step))
    dropped: Counter[str] = Counter()

    async def score_and_record(episode: Episode) -> None:
        if episode.stop_reason is not StopReason.ERROR:
            began = time.monotonic()
            try:
                scores = await parts.teacher.score(episode)
            except TeacherError as error:
                dropped[error.kind] += 1
                episode.error = EpisodeError(boundary="teacher", kind=error.kind, message=str(error)[:2000])
            else:
                for trace, score in zip(episode.traces, scores, strict=True):
                    trace.teacher_logprobs, trace.teacher_topk = score.logprobs, score.topk
                    trace.check()
            episode.timing["score"] = time.monotonic() - began
        on_episode()

    def ended(episode: Episode) -> None:
        scoring.append(asyncio.ensure_future(score_and_record(episode)))

    began = time.monotonic()
    tokens_before = parts.teacher.num_tokens
    episodes = await run_episodes(
        jobs,
        make_env=lambda: parts.make_env(verify=not config.skip_verification, step=step),
        make_actor=lambda: TokenActor(parts.renderer, parts.policy, sampling_of(parts)),
        max_concurrent=config.rollout.max_concurrent,
        on_episode=ended,
        away_s=parts.student_endpoint.away_s,
    )
    played_s = time.monotonic() - began
    await asyncio.gather(*scoring)
    scored_s = time.monotonic() - began - played_s
    for episode in episodes:  # in the order of the jobs, so that the file does not depend on who was first
        writer.append(episode)
    writer.close()

    played = [e for e in episodes if e.stop_reason is not StopReason.ERROR]
    trainable = [e for e in played if e.error is None and any(t.num_trained for t in e.traces)]
    metrics = rollout_metrics(episodes)
    wanted = sum(t.num_trained for e in played for t in e.traces)
    scored = sum(t.num_trained for e in trainable for t in e.traces)
    metrics |= {
        "teacher/coverage": scored / wanted if wanted else None,
        "teacher/tokens": parts.teacher.num_tokens - tokens_before,
        "train/dropped": sum(dropped.values()),
        "time/rollout": played_s,
        "time/score": scored_s,
        "tokens_per_s/rollout": sum(e.num_sampled for e in played) / played_s if played_s > 0 else None,
        **{f"teacher/dropped/{kind}": n for kind, n in sorted(dropped.items())},
    }
    refuse_if_starved(episodes, trainable, dropped, config.teacher.max_dropped_fraction)
    return ScoredStep(episodes=episodes, trainable=trainable, metrics=metrics, dropped=dropped)


def sampling_of(parts: Parts) -> Sampling:
    """How the configuration wants tokens to be drawn."""
    rollout = parts.config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        top_logprobs=parts.config.teacher.top_k if parts.config.loss.candidates == "student" else 0,
        max_context=parts.max_context,
    )


def refuse_if_starved(
    episodes: Sequence[Episode], trainable: Sequence[Episode], dropped: Counter[str], allowed: float
) -> None:
    """Stop rather than train on the little that is left: what is missing is rarely missing at random."""
    causes = Counter(f"{e.error.boundary}/{e.error.kind}: {e.error.message[:200]}" for e in episodes if e.error)
    listed = "".join(f"\n  {n} x {cause}" for cause, n in causes.most_common(3))
    if not trainable:
        raise TooManyDropped(f"none of the step's {len(episodes)} episodes can be trained on:{listed or ' no tokens'}")
    share = sum(dropped.values()) / len(episodes)
    if share > allowed:
        raise TooManyDropped(
            f"{share:.0%} of the step's episodes have no teacher score "
            f"(teacher.max_dropped_fraction = {allowed:g}):{listed}"
        )


async def evaluate(
    parts: Parts, run: RunDir, endpoint: Endpoint, *, name: str, step: int, on_episode: Callable[[], None]
) -> tuple[int, Metrics]:
    """Play the held-out tasks with a served model; graders are on, nothing is trained.

    Returns:
        The number of episodes, and their metrics.
    """
    config = parts.config
    tasks = parts.eval_tasks[: config.eval.num_tasks]
    jobs = jobs_for(tasks, group_size=config.eval.group_size, step=step, seed=config.seed + 1_000_003)
    is_student = endpoint is parts.student_endpoint
    policy = parts.policy if is_student else VllmPolicy(endpoint.transport, endpoint.model)
    episodes = await run_episodes(
        jobs,
        make_env=lambda: parts.make_env(verify=True),
        make_actor=lambda: TokenActor(parts.renderer, policy, sampling_of(parts)),
        max_concurrent=config.rollout.max_concurrent,
        on_episode=lambda _: on_episode(),
        away_s=endpoint.away_s,
    )
    kind = "eval" if name == "student" else f"eval_{name}"
    writer = EpisodeWriter(run.episodes_file(step, kind=kind))
    for episode in episodes:
        writer.append(episode)
    writer.close()
    return len(episodes), rollout_metrics(episodes)
