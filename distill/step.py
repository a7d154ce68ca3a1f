"""Hops 1 to 5 of a training step: tasks in, scored episodes out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent_loop.conversation import Sampling, TokenActor
from agent_loop.episodes import BadLine, EpisodeWriter, read_episodes
from agent_loop.policy import VllmPolicy
from agent_loop.rollout import EpisodeJob, play_all
from agent_loop.types import Episode, EpisodeError
from distill.build import Parts
from distill.config import RunConfig
from distill.endpoints import Endpoint
from distill.environment import Stages
from distill.metrics import Metrics, mean, rollout_metrics
from distill.rundir import RunDir, eval_kind
from distill.sources import Source
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
    cursor: int = 0
    """Tasks taken since the start of the run, those of this step included."""

    @property
    def num_sampled(self) -> int:
        """Tokens, of the episodes that did not fail."""
        return sum(e.num_sampled for e in self.episodes if e.stop_reason is not StopReason.ERROR)


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
    parts: Parts,
    run: RunDir,
    tasks: Sequence[Task],
    step: int,
    *,
    on_played: Callable[[], None] = lambda: None,
    on_episode: Callable[[], None] = lambda: None,
) -> ScoredStep:
    """Play the step's episodes, score each as soon as it ends, and record all of them.

    Args:
        on_played: called as each episode ends.
        on_episode: called as each is scored.

    Raises:
        TooManyDropped: nothing would be left to train on, or too little.
    """
    config = parts.config
    jobs = jobs_for(tasks, group_size=config.rollout.group_size, step=step, seed=config.seed)
    num_sent = 0

    def sent(tokens: int) -> None:
        nonlocal num_sent
        num_sent += tokens

    async def score_and_record(episode: Episode) -> None:
        if episode.stop_reason is not StopReason.ERROR:
            began = time.monotonic()
            try:
                with parts.activity.teacher:
                    scores = await parts.teacher_of(episode.task).scorer.score(episode, on_sent=sent)
            except TeacherError as error:
                episode.error = EpisodeError(boundary="teacher", kind=error.kind, message=str(error)[:2000])
            else:
                for trace, score in zip(episode.traces, scores, strict=True):
                    trace.teacher_logprobs, trace.teacher_topk = score.logprobs, score.topk
                    trace.check()
            episode.timing["score"] = time.monotonic() - began
        on_episode()

    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as scoring:

            def ended(episode: Episode) -> None:
                scoring.create_task(score_and_record(episode))
                on_played()

            with parts.activity.rollout:
                episodes = await play(
                    parts,
                    jobs,
                    parts.policy,
                    parts.student_endpoint,
                    verify=not config.skip_verification,
                    step=step,
                    on_episode=ended,
                )
            played_s = time.monotonic() - began
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the first: the others are its consequence or its like
    scored_s = time.monotonic() - began - played_s
    writer = EpisodeWriter(run.episodes_file(step))
    for episode in episodes:  # in the order of the jobs, so that the file does not depend on who was first
        writer.append(episode)
    writer.close()

    scored = scored_step(episodes)
    timings = [e.timing for e in episodes if e.stop_reason is not StopReason.ERROR]
    scored.metrics |= {
        "teacher/tokens": num_sent,
        "time/rollout": played_s,
        "time/score": scored_s,
        "time/sampling": mean([timing["sample"] for timing in timings]),
        "time/tools": mean([timing["env"] for timing in timings]),
        "tokens_per_s/rollout": scored.num_sampled / played_s if played_s > 0 else None,
        **({"rollout/workers_lost": parts.workers.num_lost} if parts.workers is not None else {}),
    }
    refuse_if_starved(episodes, scored.trainable, scored.dropped, config.teacher.max_dropped_fraction)
    return scored


def read_back(path: Path, jobs: Sequence[EpisodeJob], config: RunConfig) -> ScoredStep:
    """The scored episodes that an earlier attempt recorded, with the metrics that they tell by themselves.

    Raises:
        OSError: the file is not there.
        ValueError: a line is no episode, or the episodes are not those of `jobs`.
    """
    episodes = []
    for line in read_episodes(path):
        if isinstance(line, BadLine):
            raise ValueError(f"line {line.line_number} is no episode ({line.reason})")
        episodes.append(line)
    if [episode.id for episode in episodes] != [job.id for job in jobs]:
        raise ValueError(f"has other episodes than the {len(jobs)} of the step")
    scored = scored_step(episodes)
    refuse_if_starved(episodes, scored.trainable, scored.dropped, config.teacher.max_dropped_fraction)
    return scored


def scored_step(episodes: Sequence[Episode]) -> ScoredStep:
    """What can be trained on, and what the episodes tell."""
    played = [e for e in episodes if e.stop_reason is not StopReason.ERROR]
    trainable = [e for e in played if e.error is None and any(t.num_trained for t in e.traces)]
    dropped = Counter(e.error.kind for e in played if e.error is not None)
    wanted = sum(t.num_trained for e in played for t in e.traces)
    scored = sum(t.num_trained for e in trainable for t in e.traces)
    metrics = rollout_metrics(episodes) | {
        "teacher/coverage": scored / wanted if wanted else None,
        "train/dropped": dropped.total(),
        **{f"teacher/dropped/{kind}": n for kind, n in sorted(dropped.items())},
    }
    return ScoredStep(episodes=list(episodes), trainable=trainable, metrics=metrics, dropped=dropped)


async def play(
    parts: Parts,
    jobs: Sequence[EpisodeJob],
    policy: VllmPolicy,
    endpoint: Endpoint,
    *,
    verify: bool,
    on_episode: Callable[[Episode], None],
    step: int | None = None,
) -> list[Episode]:
    """Play episodes where `rollout.executor` says: in this process, or in workers (`RayWorkers.play`).

    Args:
        step: of training, for the curriculum.
    """
    sampling, max_concurrent = sampling_of(parts), parts.config.rollout.max_concurrent
    if parts.workers is not None:
        return await parts.workers.play(
            jobs,
            policy=policy,
            sampling=sampling,
            verify=verify,
            step=step,
            max_concurrent=max_concurrent,
            slots=parts.slots,
            on_episode=on_episode,
            away_s=endpoint.away_s,
        )
    stages = Stages(parts.config, verify=verify, step=step)

    async def play_one(job: EpisodeJob) -> Episode:
        return await stages.play(job, TokenActor(parts.renderer, policy, sampling), away_s=endpoint.away_s)

    try:
        return await play_all(jobs, play_one, max_concurrent=max_concurrent, slots=parts.slots, on_episode=on_episode)
    finally:
        await stages.aclose()


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
    parts: Parts, run: RunDir, *, by_teachers: bool, name: str, step: int, on_episode: Callable[[], None]
) -> tuple[int, Metrics]:
    """Play the held-out tasks; graders are on, nothing is trained.

    Args:
        by_teachers: each source's tasks are played by its teacher, which sees what the student sees. Else the student
            plays them.

    Returns:
        The number of episodes, and their metrics.
    """
    config = parts.config
    episodes: list[Episode] = []
    for endpoint, sources in players_of(parts, by_teachers=by_teachers):
        tasks = [task for source in sources for task in source.eval_tasks[: config.eval.num_tasks]]
        jobs = jobs_for(tasks, group_size=config.eval.group_size, step=step, seed=config.seed + 1_000_003)
        policy = VllmPolicy(endpoint.transport, endpoint.model) if by_teachers else parts.policy
        episodes += await play(parts, jobs, policy, endpoint, verify=True, on_episode=lambda _: on_episode())
    writer = EpisodeWriter(run.episodes_file(step, kind=eval_kind(name)))
    for episode in episodes:
        writer.append(episode)
    writer.close()
    return len(episodes), rollout_metrics(episodes)


def players_of(parts: Parts, *, by_teachers: bool) -> list[tuple[Endpoint, list[Source]]]:
    """Who plays the held-out tasks of which sources."""
    if not by_teachers:
        return [(parts.student_endpoint, list(parts.sources.values()))]
    served: dict[int, tuple[Endpoint, list[Source]]] = {}
    for source in parts.sources.values():
        endpoint = parts.teachers[source.teacher].endpoint
        served.setdefault(id(endpoint), (endpoint, []))[1].append(source)
    return list(served.values())
