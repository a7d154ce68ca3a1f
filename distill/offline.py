"""`python -m distill.run --episodes FILE`: training on stored, scored episodes, without environments or servers.

    episodes -> batch_size x group_size of them in a seeded order -> update -> record

Tokens were sampled by other weights than those that are trained on them, so this is off policy by construction: the
ratio of the two probabilities corrects it up to `loss.rho`, and nothing samples new tokens where the student goes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_loop.renderer import load_renderer
from agent_loop.types import Episode
from distill import models
from distill.build import Core, load_student
from distill.config import RunConfig
from distill.failures import Interrupted
from distill.ranks import join
from distill.report import before_after, plot
from distill.resume import TaskSet, stat_of
from distill.rundir import RunDir, read_jsonl
from distill.step import scored_step
from distill.stopping import StopFlag
from distill.stored import Line, StoredEpisodes, StoredError, check_text, scan_for, summary
from distill.student import OutOfMemory
from distill.tasks import TaskSource
from distill.watch import AlarmStop

if TYPE_CHECKING:
    from distill.checkpoint import Checkpoint
    from distill.console import Console
    from distill.run import Saver
    from distill.watch import Watch


@dataclass(slots=True, kw_only=True)
class StoredParts(Core):
    """Everything that a run on stored episodes is made of."""

    stored: StoredEpisodes
    tokenizer: str
    """Fingerprint of the student's."""

    def metadata(self) -> dict[str, Any]:
        return Core.metadata(self) | {"tokenizer": self.tokenizer, "num_episodes": len(self.stored.lines)}

    async def aclose(self) -> None:
        await asyncio.to_thread(self.student.ranks.close)


def build_stored(config: RunConfig, console: Console) -> StoredParts:
    """Check all episodes, then load the student.

    Raises:
        StoredError: an episode cannot be trained on, with file and line, or its ids are not the student's.
        BuildError: the student is not what the configuration asks for.
    """
    student_path = models.resolve(config.student.model, progress=console.say)
    teacher_path: str | Path = student_path
    if config.loss.type == "full":
        teacher_path = models.resolve(config.teacher_model, progress=console.say)
    renderer = load_renderer(student_path, enable_thinking=config.student.enable_thinking)
    same_vocabulary = "vocabulary" not in config.check.skip

    def check(line: Line, episode: Episode) -> None:
        if same_vocabulary:
            check_text(line, episode, renderer.decode, f"student.model ({config.student.model})")

    stored = scan_for(config, check=check)
    ranks = join()
    with ranks.call("build", config=config.model_dump(mode="json")):
        student = load_student(config, student_path, teacher_path, ranks)
    if stored.largest_id >= student.rows.vocab_size:
        raise StoredError(
            f"{stored.source}: id {stored.largest_id} is in the episodes; student.model ({config.student.model}) has "
            f"{student.rows.vocab_size} ids"
        )
    if student.padded_because is not None:
        console.say(f"micro-batches are padded, not packed: {student.padded_because}")
    console.say(summary(stored))
    console.say(
        "off policy by construction: other weights sampled these tokens, whatever the student has become. loss.rho "
        f"({config.loss.rho:g}) caps the ratio that corrects for it; watch ratio/clipped. Nothing is played, asked, "
        "published or evaluated"
    )
    return StoredParts(
        config=config,
        student=student,
        stored=stored,
        tokenizer=renderer.fingerprint,
        task_sets=[identity(stored)],
    )


def identity(stored: StoredEpisodes) -> TaskSet:
    """What the episodes are, so that a resumed run can tell whether they still are."""
    hashes = [line.sha256 for line in stored.lines]
    size, mtime_ns = stat_of(stored.source) if stored.source.is_file() else (None, None)
    return TaskSet(
        key="episodes",
        source=str(stored.source.resolve()),
        num_tasks=len(hashes),
        sha256=hashlib.sha256(b"".join(hashes)).hexdigest(),
        sha256_sorted=hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
        size=size,
        mtime_ns=mtime_ns,
        noun="episodes",
    )


def alarms_for(config: RunConfig) -> RunConfig:
    """The configuration without the alarms that compare with the sampler, or take its tokens for the student's: here
    they would tell what is known."""
    off: dict[str, Any] = {"mismatch_kl": None, "mismatch_max": None, "kl_negative": None}
    return config.model_copy(update={"alarms": config.alarms.model_copy(update=off)})


async def train_stored(
    parts: StoredParts, run: RunDir, console: Console, saver: Saver, checkpoint: Checkpoint | None, watch: Watch
) -> None:
    """The run: `steps` times episodes -> update -> record."""
    config = parts.config
    first, cursor = (checkpoint.step, checkpoint.cursor) if checkpoint else (0, 0)
    source = TaskSource(parts.stored.lines, seed=config.seed, cursor=cursor)
    stop = StopFlag(parts)
    try:
        for step in range(first + 1, config.steps + 1):
            began = time.monotonic()
            lines = source.take(config.rollout.batch_size * config.rollout.group_size)
            episodes = await asyncio.to_thread(read_all, lines, config)
            read_s = time.monotonic() - began
            scored = scored_step(episodes)
            trained = await parts.train_step(scored.trainable, step=step)
            saver.trained(step, source.cursor)
            seconds = time.monotonic() - began
            metrics = {
                **scored.metrics,
                **trained,
                "epoch": source.epoch,
                "idle/trainer": read_s,
                "time/train": seconds - read_s,
                "time/step": seconds,
            }
            run.append_metrics({"step": step, **metrics, **watch.alarms({"step": step, **metrics})})
            console.step(step, config.steps, metrics)
            watch.speak()
            if step == config.steps or stop.asked or step % config.checkpoint.every == 0:
                saver.save(())
            if stop.asked and step < config.steps:
                raise Interrupted(f"stopped after step {step}; continue with --resume {run.path}")
    except (OutOfMemory, Interrupted, AlarmStop, StoredError):
        saver.save(())
        raise


def read_all(lines: list[Line], config: RunConfig) -> list[Episode]:
    """The episodes of a step; teacher candidates that the loss does not use are left out, as not every file has as
    many.

    Raises:
        StoredError: a file has changed.
    """
    episodes = [line.read() for line in lines]
    if config.loss.type != "topk":
        for episode in episodes:
            for trace in episode.traces:
                trace.teacher_topk = None
    return episodes


def finish_stored(run: RunDir, console: Console) -> None:
    """The fall of `teacher_kl`, and the curve."""
    console.table("\n" + before_after([], read_jsonl(run.path / "metrics.jsonl")) + "\n")
    console.say(f"curve: {plot(run.path)}")
    console.say(f"export the student: python -m distill.export {run.path} --out FOLDER")
