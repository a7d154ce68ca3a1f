"""`python -m distill.run --env medbrowse`: on-policy distillation from a tool environment to a reverse-KL update.

The training loop is `train`. Everything that it calls is one module away.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config_load import ConfigError, LoadedConfig, add_config_arguments, load_from_arguments
from distill.console import Console, fail
from distill.failures import EXIT_OK, EXIT_USAGE, Interrupted, guarded
from distill.follow import follow, is_follower, leave
from distill.stopping import TRACKERS_S, interrupt

if TYPE_CHECKING:
    from distill.build import Core, Parts
    from distill.checkpoint import Checkpoint
    from distill.config import RunConfig
    from distill.rundir import RunDir
    from distill.watch import Watch


async def train(parts: Parts, run: RunDir, console: Console, checkpoint: Checkpoint | None, watch: Watch) -> None:
    """The run: check, evaluate, then `steps` times tasks -> episodes -> scores -> update -> publish -> record."""
    from distill.cost import StepClock
    from distill.pipeline import Pipeline
    from distill.serving.fleet import ServerLost
    from distill.sources import mixture
    from distill.stopping import StopFlag
    from distill.student import OutOfMemory
    from distill.watch import AlarmStop

    config = parts.config
    first, cursor, pending = (checkpoint.step, checkpoint.cursor, checkpoint.pending) if checkpoint else (0, 0, ())
    saver = Saver(run, parts, console, step=first, cursor=cursor)
    await parts.start(console)
    await preflight(parts, console, version=first)
    stop = StopFlag(parts)
    tasks = mixture(parts.sources, seed=config.seed, cursor=cursor)
    pipeline = Pipeline(parts, run, tasks, version=first, pending=pending, say=console.say)
    clock = StepClock(parts.activity, parts.gpus())
    episodes = config.rollout.batch_size * config.rollout.group_size
    try:
        if first == 0 and config.eval.at_start:
            await evaluate_and_record(parts, run, console, step=0)
        for step in range(first + 1, config.steps + 1):
            clock.start()
            with console.phase(f"step {step}: episodes", episodes, announce=False) as phase:
                scored = await parts.while_served(pipeline.next(step, phase.advance))
            clock.lap("idle/trainer")
            metrics = scored.metrics | await parts.train_step(scored.trainable, step=step)
            clock.lap("time/train")
            saver.trained(step, scored.cursor)
            try:
                metrics["publish/canary"] = await parts.while_served(parts.publish(step))
                pipeline.published(step)
            finally:  # the step is made, whatever becomes of its publication
                clock.lap("time/publish")
                metrics |= clock.metrics(metrics) | outages(parts)
                run.append_metrics({"step": step, **metrics, **watch.alarms({"step": step, **metrics})})
                console.step(step, config.steps, metrics)
            watch.speak()
            last = step == config.steps or stop.asked
            if config.eval.every and step % config.eval.every == 0 and not last:
                await evaluate_and_record(parts, run, console, step=step)
            if last or step % config.checkpoint.every == 0 or saver.is_best(step):
                saver.save(pipeline.pending)
            if stop.asked and step < config.steps:
                raise Interrupted(f"stopped after step {step}; continue with --resume {run.path}")
        if config.eval.at_end:
            await evaluate_and_record(parts, run, console, step=config.steps)
    except (ServerLost, OutOfMemory, Interrupted, AlarmStop):
        saver.save(pipeline.pending)
        raise
    finally:
        await pipeline.aclose()


class Saver:
    """Saves the last step that was made, once."""

    def __init__(self, run: RunDir, parts: Core, console: Console, *, step: int, cursor: int) -> None:
        self._run, self._parts, self._console = run, parts, console
        self._step, self._cursor, self._saved = step, cursor, step
        self._warned: set[str] = set()

    def trained(self, step: int, cursor: int) -> None:
        """The student's weights are those after `step`, and the tasks before `cursor` are used."""
        self._step, self._cursor = step, cursor

    def is_best(self, step: int) -> bool:
        """Whether the student of this step is the one to keep, by the evaluations so far."""
        return self._parts.config.checkpoint.keep_best and self._best() == step

    def _best(self) -> int | None:
        from distill.rundir import best_step

        return best_step(self._run.path)

    def save(self, pending: Sequence[int]) -> None:
        """
        Args:
            pending: later steps whose episodes are finished (`Pipeline.pending`).
        """
        from distill.checkpoint import save_checkpoint

        if self._step > self._saved:
            keep = self._parts.config.checkpoint
            best = self._best() if keep.keep_best else None
            self._run.check()
            save_checkpoint(
                self._run.path / "checkpoints",
                self._step,
                self._parts.student,
                cursor=self._cursor,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                keep=() if best is None else (best,),
                pending=pending,
            )
            self._saved = self._step
            self._look_at_tasks()

    def _look_at_tasks(self) -> None:
        """The run goes on with the tasks that it read at its start; its user learns now, not at the next resume, that
        their file is another by now."""
        for tasks in self._parts.task_sets:
            if tasks.key not in self._warned and tasks.file_changed():
                self._warned.add(tasks.key)
                self._console.say(
                    f"warning: {tasks.source} ({tasks.key}) has changed since it was read; this run goes on with what "
                    "it read, but --resume will refuse other tasks"
                )


def outages(parts: Parts) -> dict[str, float]:
    """Restarts and seconds without a server since the start of the run, where there are servers."""
    if not parts.fleets:
        return {}
    return {
        "servers/restarts": sum(fleet.num_restarts for fleet in parts.fleets),
        "servers/away_s": sum(fleet.away_s for fleet in parts.fleets),
    }


async def preflight(parts: Parts, console: Console, *, version: int) -> None:
    """The checks of `python -m distill.check`; they run by themselves before the first step, and publish the student's
    weights on their way.

    Raises:
        CheckFailed: with every error found.
    """
    from distill.check import CheckFailed, check_parts

    findings = await check_parts(parts, lambda: parts.publish(version))
    for finding in findings:
        if finding.level != "ok":
            console.say(str(finding))
    errors = [f for f in findings if f.level == "error"]
    if errors:
        raise CheckFailed(errors)
    console.say(f"checks: {sum(f.level == 'ok' for f in findings)} ok, {len(findings) - len(errors)} run")
    for teacher in parts.teachers.values():
        scorer = await teacher.scorer.probe()
        if teacher.endpoint.fleet is not None:
            console.say(f"{teacher.key} scores by: {scorer}")
    await parts.forget()


async def evaluate_and_record(parts: Parts, run: RunDir, console: Console, *, step: int) -> None:
    """Play the held-out tasks with the student, and once with the teacher; one line each in `evals.jsonl`."""
    from distill.rundir import evaluations
    from distill.step import evaluate

    settings = parts.config.eval
    total = sum(min(len(source.eval_tasks), settings.num_tasks) for source in parts.sources.values())
    if not total:
        return
    names = ["teacher", "student"] if step == 0 and settings.teacher else ["student"]
    recorded = {(line["name"], line["step"]) for line in evaluations(run.path)}
    for name in names:
        if (name, step) in recorded:  # by an earlier attempt
            continue
        with console.phase(f"evaluating the {name} on held-out tasks", total * settings.group_size) as phase:
            played = evaluate(parts, run, by_teachers=name == "teacher", name=name, step=step, on_episode=phase.advance)
            count, metrics = await parts.while_served(played)
        run.append_metrics({"name": name, "step": step, "episodes": count, "metrics": metrics}, file="evals.jsonl")
        success = metrics.get("reward/success")
        console.say(
            f"{name} at step {step}: success {success:.1%} of {count}" if success is not None else f"{name}: no grader"
        )
    await parts.forget()


def finish(run: RunDir, console: Console, max_staleness: int) -> None:
    """The table of before and after, what it cost, the bottleneck, the curve, and where to look next."""
    from distill.cost import bottleneck, cost_lines
    from distill.report import Evaluation, before_after, plot
    from distill.rundir import evaluations, read_jsonl

    lines = read_jsonl(run.path / "metrics.jsonl")
    evaluated = [Evaluation(**line) for line in evaluations(run.path)]
    console.table("\n" + before_after(evaluated, lines) + "\n")
    for text in (*cost_lines(lines), bottleneck(lines, max_staleness)):
        if text is not None:
            console.say(text)
    console.say(f"curve: {plot(run.path)}")
    console.say(f"read the episodes: python -m agent_loop.view {run.path}")


async def run_training(
    loaded: LoadedConfig, console: Console, resume: Path | None, allowed: Collection[str] = ()
) -> None:
    """Build the parts, open the run directory, train, report, and leave nothing running.

    Args:
        resume: a run directory, or one checkpoint in it.
        allowed: keys whose values or contents may differ from those of the run that is resumed.
    """
    from distill.build import build
    from distill.offline import StoredParts, alarms_for, build_stored, finish_stored, train_stored
    from distill.resume import point_of
    from distill.rundir import RunDir
    from distill.watch import Watch

    config = loaded.config
    path, wanted = point_of(resume) if resume else (Path(config.output_dir) / _run_id(config), None)
    run = RunDir.resume(path) if resume else RunDir.create(path, config.model_dump(mode="json"))
    status, tracker_s = "failed", config.tracking.finish_timeout_s
    parts: Parts | StoredParts | None = None
    watch = None
    try:
        console.say(f"run directory: {path}")
        parts = build(config, console, path) if config.episodes is None else build_stored(config, console)
        metadata = parts.metadata()
        recorded = run.last_step()
        checkpoint = continued(loaded, run, metadata, parts, console, wanted, allowed) if resume else None
        run.note(**metadata)
        step, cursor = (checkpoint.step, checkpoint.cursor) if checkpoint else (0, 0)
        watched = config if config.episodes is None else alarms_for(config)
        watch = Watch(watched, path, console.say, resumed=step, recorded=recorded)
        if isinstance(parts, StoredParts):
            saver = Saver(run, parts, console, step=step, cursor=cursor)
            await parts.student.ranks.while_whole(train_stored(parts, run, console, saver, checkpoint, watch))
            finish_stored(run, console)
        else:
            await parts.student.ranks.while_whole(train(parts, run, console, checkpoint, watch))
            finish(run, console, config.rollout.max_staleness)
        status = "finished"
    except (Interrupted, KeyboardInterrupt, asyncio.CancelledError) as error:
        status, tracker_s = "interrupted", TRACKERS_S if isinstance(error, Interrupted) else 0.0
        raise
    finally:
        if parts is not None:
            await parts.aclose()
        run.close(status)
        if watch is not None:
            watch.close(status, tracker_s)
        if status == "failed" and any((path / "checkpoints").glob("step_*")):
            console.say(f"what was saved is kept; once the cause is mended, continue with --resume {path}")


def _run_id(config: RunConfig) -> str:
    name = config.env.strip("/").replace("/", "-").replace(":", "-")
    return config.run_id or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def continued(
    loaded: LoadedConfig,
    run: RunDir,
    metadata: dict[str, Any],
    parts: Core,
    console: Console,
    wanted: Path | None,
    allowed: Collection[str],
) -> Checkpoint | None:
    """Check that this is still the run that it was, and put everything back to where it stood: the student, and the
    run's files. Nothing is changed before all checks have passed.

    Args:
        wanted: the checkpoint to go on from; None: the newest whole one.

    Returns:
        None: there is no checkpoint yet, the run begins again.

    Raises:
        CheckpointError: `wanted`, or all there are, is damaged or of another model.
        DataChanged: the tasks are others.
    """
    from distill.checkpoint import find_latest, open_checkpoint, set_aside_after
    from distill.resume import compare

    changes, note = compare(run.record(), metadata, allowed=allowed)
    if note:
        console.say(note)
    checkpoint = open_checkpoint(wanted) if wanted else find_latest(run.path / "checkpoints", report=console.say)
    if checkpoint:
        parts.student.restore(checkpoint)
    step = checkpoint.step if checkpoint else 0
    run.change(loaded.config.model_dump(mode="json"), [asdict(change) for change in (*loaded.changes, *changes)])
    if wanted:
        for aside in set_aside_after(run.path / "checkpoints", step):
            console.say(f"a checkpoint of a later step is now {aside}")
    run.rewind(step, pending=checkpoint.pending if checkpoint else ())
    console.say(f"resuming after step {step}" if checkpoint else "no checkpoint yet: starting over")
    return checkpoint


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: docs/concepts.md, "Failures"."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.run",
        description="Train a student on the tool environment ENV by on-policy distillation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="continue the run in this directory from its newest whole checkpoint, or from RUN/checkpoints/step_000010",
    )
    parser.add_argument(
        "--allow-change",
        metavar="KEY[,KEY]",
        type=lambda text: text.split(","),
        default=[],
        help="keys that may differ from those of the resumed run; what changed is recorded in its run.json",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and the tasks, print the plan, stop"
    )
    arguments, rest = parser.parse_known_args(argv)
    if is_follower():
        return EXIT_OK if arguments.dry_run else follow()
    console = Console()
    if arguments.allow_change and arguments.resume is None:
        fail("--allow-change is about a run that is continued: it needs --resume RUN")
        return EXIT_USAGE
    try:
        loaded = load_from_arguments(arguments, rest, console.say)
    except ConfigError as error:
        fail(str(error))
        return EXIT_USAGE
    if arguments.dry_run:
        return dry_run(loaded, console)
    signal.signal(signal.SIGTERM, interrupt)  # until `train` knows better
    return guarded(lambda: asyncio.run(run_training(loaded, console, arguments.resume, arguments.allow_change)))


def dry_run(loaded: LoadedConfig, console: Console) -> int:
    """Validate everything that needs no model, and print what a run would do."""
    from distill.plan import plan

    def show() -> None:
        print(plan(loaded.config))

    return guarded(show)


if __name__ == "__main__":
    leave(main())
