"""`python -m distill.run --env medbrowse`: on-policy distillation from a tool environment to a reverse-KL update.

The training loop is `train`. Everything that it calls is one module away.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config_load import ConfigError, LoadedConfig, add_config_arguments, load_from_arguments
from distill.console import Console, fail
from distill.failures import EXIT_OK, EXIT_USAGE, Interrupted, guarded
from distill.follow import follow, is_follower

if TYPE_CHECKING:
    from distill.build import Parts
    from distill.checkpoint import Checkpoint
    from distill.rundir import RunDir


async def train(parts: Parts, run: RunDir, console: Console, checkpoint: Checkpoint | None) -> None:
    """The run: check, evaluate, then `steps` times tasks -> episodes -> scores -> update -> publish -> record."""
    from distill.serving.fleet import ServerLost
    from distill.step import collect
    from distill.tasks import TaskSource

    config = parts.config
    stop = StopFlag()
    first = checkpoint.step if checkpoint else 0
    source = TaskSource(parts.train_tasks, seed=config.seed, cursor=checkpoint.cursor if checkpoint else 0)
    saver = Saver(run, parts, step=first, cursor=source.cursor)
    await parts.start(console)
    await preflight(parts, console, version=first)
    try:
        if first == 0 and config.eval.at_start:
            await evaluate_and_record(parts, run, console, step=0)
        for step in range(first + 1, config.steps + 1):
            began = time.monotonic()
            tasks = source.take(config.rollout.batch_size)
            episodes = len(tasks) * config.rollout.group_size
            with console.phase(f"step {step}: episodes", episodes, announce=False) as phase:
                scored = await parts.while_served(collect(parts, run, tasks, step, on_episode=phase.advance))
            train_began = time.monotonic()
            metrics = scored.metrics | await asyncio.to_thread(parts.student.train_step, scored.trainable, step=step)
            saver.trained(step, source.cursor)
            publish_began = time.monotonic()
            metrics |= {"epoch": source.epoch, "time/train": publish_began - train_began}
            try:
                metrics["publish/canary"] = await parts.while_served(parts.publish(step))
            finally:  # the step is made, whatever becomes of its publication
                now = time.monotonic()
                metrics |= {"time/publish": now - publish_began, "time/step": now - began, **outages(parts)}
                run.append_metrics({"step": step, **metrics})
                console.step(step, config.steps, metrics)
            last = step == config.steps or stop.asked
            if config.eval.every and step % config.eval.every == 0 and not last:
                await evaluate_and_record(parts, run, console, step=step)
            if last or step % config.checkpoint.every == 0:
                saver.save()
            if stop.asked and step < config.steps:
                raise Interrupted(f"stopped after step {step}; continue with --resume {run.path}")
        if config.eval.at_end:
            await evaluate_and_record(parts, run, console, step=config.steps)
    except ServerLost:
        saver.save()
        raise


class Saver:
    """Saves the last step that was made, once."""

    def __init__(self, run: RunDir, parts: Parts, *, step: int, cursor: int) -> None:
        self._run, self._parts = run, parts
        self._step, self._cursor, self._saved = step, cursor, step

    def trained(self, step: int, cursor: int) -> None:
        """The student's weights are those after `step`, and the tasks before `cursor` are used."""
        self._step, self._cursor = step, cursor

    def save(self) -> None:
        from distill.checkpoint import save_checkpoint

        if self._step > self._saved:
            keep_last = self._parts.config.checkpoint.keep_last
            folder = self._run.path / "checkpoints"
            save_checkpoint(folder, self._step, self._parts.student, cursor=self._cursor, keep_last=keep_last)
            self._saved = self._step


def outages(parts: Parts) -> dict[str, float]:
    """Restarts and seconds without a server since the start of the run, where there are servers."""
    if not parts.fleets:
        return {}
    return {
        "servers/restarts": sum(fleet.num_restarts for fleet in parts.fleets),
        "servers/away_s": sum(fleet.away_s for fleet in parts.fleets),
    }


class StopFlag:
    """The first SIGINT or SIGTERM lets the step in hand finish and saves; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more to stop now", file=sys.stderr)


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
    scorer = await parts.teacher.probe()
    if parts.teacher_endpoint.fleet is not None:
        console.say(f"teacher scores by: {scorer}")


async def evaluate_and_record(parts: Parts, run: RunDir, console: Console, *, step: int) -> None:
    """Play the held-out tasks with the student, and once with the teacher; one line each in `evals.jsonl`."""
    from distill.step import evaluate

    if not parts.eval_tasks:
        return
    endpoints = [("student", parts.student_endpoint)]
    if step == 0 and parts.config.eval.teacher:
        endpoints.insert(0, ("teacher", parts.teacher_endpoint))
    for name, endpoint in endpoints:
        total = min(len(parts.eval_tasks), parts.config.eval.num_tasks) * parts.config.eval.group_size
        with console.phase(f"evaluating the {name} on held-out tasks", total) as phase:
            played = evaluate(parts, run, endpoint, name=name, step=step, on_episode=phase.advance)
            count, metrics = await parts.while_served(played)
        run.append_metrics({"name": name, "step": step, "episodes": count, "metrics": metrics}, file="evals.jsonl")
        success = metrics.get("reward/success")
        console.say(
            f"{name} at step {step}: success {success:.1%} of {count}" if success is not None else f"{name}: no grader"
        )


def finish(run: RunDir, console: Console) -> None:
    """The table of before and after, the curve, and where to look next."""
    from distill.report import Evaluation, before_after, plot
    from distill.rundir import read_jsonl

    lines = read_jsonl(run.path / "metrics.jsonl")
    evals = run.path / "evals.jsonl"
    evaluations = [Evaluation(**line) for line in read_jsonl(evals)] if evals.exists() else []
    console.table("\n" + before_after(evaluations, lines) + "\n")
    console.say(f"curve: {plot(run.path)}")
    console.say(f"read the episodes: python -m agent_loop.view {run.path}")


async def run_training(loaded: LoadedConfig, console: Console, resume: Path | None) -> None:
    """Build the parts, open the run directory, train, report, and leave nothing running."""
    from distill.build import build, metadata_of
    from distill.checkpoint import find_latest
    from distill.rundir import RunDir

    config = loaded.config
    path = resume or Path(config.output_dir) / (
        config.run_id or f"{config.env.strip('/').replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    run = RunDir.resume(path) if resume else RunDir.create(path, config.model_dump(mode="json"))
    status = "failed"
    parts = None
    try:
        console.say(f"run directory: {path}")
        parts = build(config, console, path)
        run.note(**metadata_of(parts))
        checkpoint = None
        if resume:
            checkpoint = find_latest(path / "checkpoints", report=console.say)
            run.rewind(checkpoint.step if checkpoint else 0)
            if checkpoint:
                parts.student.restore(checkpoint)
                console.say(f"resuming after step {checkpoint.step}")
        await parts.student.ranks.while_whole(train(parts, run, console, checkpoint))
        finish(run, console)
        status = "finished"
    except (Interrupted, KeyboardInterrupt, asyncio.CancelledError):
        status = "interrupted"
        raise
    finally:
        if parts is not None:
            await parts.aclose()
        run.close(status)
        if status == "failed" and any((path / "checkpoints").glob("step_*")):
            console.say(f"what was saved is kept; once the cause is mended, continue with --resume {path}")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: docs/concepts.md, "Failures"."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.run",
        description="Train a student on the tool environment ENV by on-policy distillation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and the tasks, print the plan, stop"
    )
    arguments, rest = parser.parse_known_args(argv)
    if is_follower():
        return EXIT_OK if arguments.dry_run else follow()
    console = Console()
    try:
        loaded = load_from_arguments(arguments, rest, console.say)
    except ConfigError as error:
        fail(str(error))
        return EXIT_USAGE
    if arguments.dry_run:
        return dry_run(loaded, console)
    return guarded(lambda: asyncio.run(run_training(loaded, console, arguments.resume)))


def dry_run(loaded: LoadedConfig, console: Console) -> int:
    """Validate everything that needs no model, and print what a run would do."""
    from distill.plan import plan

    def show() -> None:
        print(plan(loaded.config))

    return guarded(show)


if __name__ == "__main__":
    sys.exit(main())
