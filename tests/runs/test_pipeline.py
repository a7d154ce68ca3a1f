"""Rollouts ahead of the trainer: how old tokens may be, what fails when, and what a resumed run takes up again."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from agent_loop.types import Episode
from distill.build import Parts, build
from distill.checkpoint import find_latest, save_checkpoint
from distill.config_load import load_config
from distill.console import Console
from distill.pipeline import Pipeline, staleness_metrics
from distill.rundir import RunDir
from distill.sources import mixture
from distill.step import collect
from envs.registry import RegistryError
from tests.conformance.models import token_logprobs
from tests.fakes.fake_vllm import FakeVllm
from tests.runs.conftest import Workplace
from tests.runs.test_faults import vocabulary_size
from tests.runs.test_run import wait_for

ONE_AT_A_TIME = {"rollout.max_concurrent": 1}
"""Then which requests share a forward pass does not depend on timing, and two runs sample the same ids."""


@asynccontextmanager
async def started(workplace: Workplace, run_id: str, **overrides: Any) -> AsyncIterator[tuple[Parts, RunDir]]:
    """The parts of a run, its weights served as version 0, and its folder."""
    config = load_config([workplace.path / "run.toml"], overrides).config
    run = RunDir.create(workplace.path / "runs" / run_id, {})
    parts = build(config, Console(quiet=True), run.path)
    try:
        await parts.start(Console(quiet=True))
        await parts.publish(0)
        yield parts, run
    finally:
        await parts.aclose()
        run.close("finished")


async def train(
    parts: Parts, pipeline: Pipeline, steps: int, models: dict[int, Any] | None = None
) -> list[list[Episode]]:
    """What `distill.run.train` does, without its records. `models` gets a copy of each version."""
    trained = []
    models = {} if models is None else models
    for step in range(1, steps + 1):
        models[step - 1] = parts.student.serving_copy()
        scored = await pipeline.next(step)
        await asyncio.to_thread(parts.student.train_step, scored.trainable, step=step)
        await parts.publish(step)
        pipeline.published(step)
        trained.append(scored.episodes)
    return trained


def sampled(steps: list[list[Episode]]) -> list[list[tuple[str, list[int]]]]:
    return [[(e.id, t.token_ids) for e in episodes for t in e.traces] for episodes in steps]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - it is about somebody else's state
            await asyncio.sleep(0.01)


async def test_without_staleness_it_is_one_step_after_the_other_id_for_id(workplace: Workplace) -> None:
    async with started(workplace, "plain", **ONE_AT_A_TIME) as (parts, run):
        source, wanted = mixture(parts.sources, seed=0), []
        for step in (1, 2, 3):
            scored = await collect(parts, run, source.take(3), step)
            parts.student.train_step(scored.trainable, step=step)
            await parts.publish(step)
            wanted.append(scored.episodes)
    async with started(workplace, "piped", **ONE_AT_A_TIME) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        found = await train(parts, pipeline, 3)
        await pipeline.aclose()
    assert sampled(found) == sampled(wanted)
    for step, episodes in enumerate(found, start=1):
        assert {e.policy_version for e in episodes} == {step - 1}


@pytest.mark.parametrize("allowed", [0, 1, 2])
async def test_no_token_is_older_than_allowed(workplace: Workplace, allowed: int) -> None:
    async with started(workplace, "one", **{"rollout.max_staleness": allowed, "steps": 6}) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        models: dict[int, Any] = {}
        trained = await train(parts, pipeline, 6, models)
        await pipeline.aclose()
        source = mixture(parts.sources, seed=0)
    oldest = []
    for step, episodes in enumerate(trained, start=1):
        ages = [
            step - 1 - version
            for e in episodes
            for t in e.traces
            for version, is_trained in zip(t.policy_versions or [], t.loss_mask, strict=True)
            if is_trained and version is not None
        ]
        assert len(ages) == sum(t.num_trained for e in episodes for t in e.traces), "every token has a version"
        assert staleness_metrics(episodes, step - 1) == {
            "staleness/max": max(ages),
            "staleness/mean": pytest.approx(fmean(ages)),
        }
        assert min(ages) >= 0
        oldest.append(max(ages))
        assert [e.task.id for e in episodes] == [task.id for task in source.take(3) for _ in range(2)]
    assert max(oldest) == allowed, "it plays ahead as far as it may, and no further"
    for trace in [t for episodes in trained for e in episodes for t in e.traces]:
        of_version = {v: token_logprobs(models[v], trace.token_ids) for v in set(trace.policy_versions or []) - {None}}
        for i, version in enumerate(trace.policy_versions or []):
            if version is not None:  # no key or value of other weights had a part in it
                assert trace.sampling_logprobs[i] == pytest.approx(of_version[version][i - 1], abs=1e-4)


@pytest.mark.slow
def test_a_run_says_how_old_its_tokens_were_and_what_it_waited_for(workplace: Workplace) -> None:
    done = workplace.run("--run-id", "one", "--rollout.max_staleness", "1", check=True)
    lines = workplace.lines("one")
    assert [line["staleness/max"] for line in lines] == [0, 1, 1]
    for line in lines:
        assert line["cost/gpu_s"] is None, "seconds of cores are not those of a GPU"
        assert line["cost/teacher_tokens_per_trained"] == line["teacher/tokens"] / line["train/tokens"] > 1
        spent = line["idle/trainer"] + line["time/train"] + line["time/publish"]
        assert spent == pytest.approx(line["time/step"], rel=0.05, abs=0.01)
        assert 0 <= line["idle/rollout"] <= line["time/step"]
        assert 0 <= line["idle/trainer_for_scores"] <= line["idle/trainer"] + 1e-3
    for words in ("updates old, waited", "tokens: ", "seconds: ", "GPU-seconds: none", "bottleneck: "):
        assert words in done.stderr


async def test_the_next_step_begins_when_the_last_episodes_have_slots_to_spare(workplace: Workplace) -> None:
    """Steps of 6 episodes in 4 slots: step 2 begins in the slots that step 1's last ones leave."""
    async with started(workplace, "one", **{"rollout.max_staleness": 1, "rollout.max_concurrent": 4}) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        begun: list[int] = []
        first = asyncio.ensure_future(pipeline.next(1, lambda: begun.append(pipeline._begun)))
        await asyncio.sleep(0)  # it has begun, and no episode can have ended
        assert pipeline._begun == 1
        await first
        assert begun[-1] == 2, "before the last episode of step 1 was scored"
        await until(lambda: pipeline.pending == [2])
        assert pipeline._begun == 2, "step 3 waits for version 1"
        pipeline.published(1)
        assert pipeline._begun == 3
        await pipeline.aclose()


@pytest.mark.slow
def test_it_learns_from_tokens_that_are_an_update_old(make: Callable[..., Workplace]) -> None:
    workplace = make(**{"rollout.max_staleness": "2", "rollout.batch_size": "8", "optim.lr": "3e-3"})
    workplace.run("--run-id", "one", "--steps", "40", "--checkpoint.every", "50", check=True)
    lines = workplace.lines("one")
    kls = [line["teacher_kl"] for line in lines]
    assert fmean(kls[-5:]) < 0.7 * fmean(kls[:5])
    assert any(line["mismatch_kl"] > 1e-5 for line in lines), "sampler and trainer did differ"


async def test_what_a_later_step_fails_of_is_raised_at_once_and_nothing_is_left_running(workplace: Workplace) -> None:
    async with started(workplace, "one", **{"rollout.max_staleness": 1}) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        await pipeline.next(1)
        await until(lambda: pipeline.pending == [2])
        shutil.move(workplace.path / "adding", workplace.path / "gone")
        pipeline.published(1)  # step 3 begins, and has no environment
        await until(lambda: pipeline._plays[3].task.done())
        with pytest.raises(RegistryError, match="adding"):
            await pipeline.next(2)
        assert pipeline.pending == [2], "a checkpoint still knows of it"
        await pipeline.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_episodes_in_play_are_given_up_on_closing(workplace: Workplace) -> None:
    async with started(workplace, "one", **{"rollout.max_staleness": 2}) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        waiting = asyncio.ensure_future(pipeline.next(1))
        await until(lambda: bool(pipeline._plays))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pipeline.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert list((run.path / "episodes").iterdir()) == []


@pytest.mark.parametrize("damage", [False, True])
async def test_finished_episodes_outlive_a_stop(workplace: Workplace, damage: bool) -> None:
    async with started(workplace, "one", **{"rollout.max_staleness": 1}) as (parts, run):
        pipeline = Pipeline(parts, run, mixture(parts.sources, seed=0), version=0)
        scored = await pipeline.next(1)
        parts.student.train_step(scored.trainable, step=1)
        await until(lambda: pipeline.pending == [2])
        folder = run.path / "checkpoints"
        save_checkpoint(folder, 1, parts.student, cursor=scored.cursor, keep_last=1, pending=pipeline.pending)
        await pipeline.aclose()
        file = run.episodes_file(2)
        before = file.read_text()
        if damage:
            file.write_text(before[:-20])
        checkpoint = find_latest(folder)
        assert checkpoint is not None
        assert (checkpoint.cursor, checkpoint.pending) == (3, (2,))
        run.episodes_file(3).write_text("unfinished")
        run.rewind(1, pending=checkpoint.pending)
        assert not run.episodes_file(3).exists()

        await parts.publish(1)
        source, said = mixture(parts.sources, seed=0, cursor=checkpoint.cursor), []
        resumed = Pipeline(parts, run, source, version=1, pending=checkpoint.pending, say=said.append)
        again = await resumed.next(2)
        await resumed.aclose()
    assert again.cursor == 6
    if damage:
        assert "is no episode (torn" in said[0]
        assert "step 2 is played again" in said[0]
        assert {e.policy_version for e in again.episodes} == {1}
    else:
        assert said == []
        assert file.read_text() == before
        assert {e.policy_version for e in again.episodes} == {0}
        assert again.metrics["staleness/max"] == 1
        assert again.metrics["teacher/coverage"] == 1.0
        assert "time/rollout" not in again.metrics, "nothing was played"


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_plays_ahead_goes_on(workplace: Workplace) -> None:
    flags = ("--rollout.max_staleness", "2")
    process = workplace.start("--run-id", "one", "--steps", "300", *flags)
    run = workplace.path / "runs" / "one"
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process_of=workplace)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    made = len(workplace.lines("one"))
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.cursor) == (made, 3 * made)
    kept = {n: (run / "episodes" / f"step_{n:06d}.jsonl").read_text() for n in checkpoint.pending}
    assert all(n in (made + 1, made + 2) for n in kept)
    workplace.run("--resume", str(run), "--steps", str(made + 3), *flags, check=True)
    lines = workplace.lines("one")
    assert [line["step"] for line in lines] == list(range(1, made + 4))
    assert all(line["staleness/max"] <= 2 for line in lines)
    for n, text in kept.items():
        assert (run / "episodes" / f"step_{n:06d}.jsonl").read_text() == text
        assert "time/rollout" not in lines[n - 1]


@pytest.mark.slow
def test_a_lost_server_ends_a_run_that_plays_ahead_with_its_last_step_saved(
    make: Callable[..., Workplace], models: Path
) -> None:
    with FakeVllm(model="teacher", vocab_size=vocabulary_size(models)) as server:
        workplace = make(**{"teacher.base_url": f'"{server.base_url}"', "teacher.model": '"teacher"'})
        flags = ("--rollout.max_staleness", "1", "--max_outage_s", "2.0", "--checkpoint.every", "1000")
        skip = '["vocabulary", "teacher_server", "tokenizer", "template"]'
        process = workplace.start("--run-id", "one", "--steps", "10000", *flags, "--check.skip", skip)
        metrics = workplace.path / "runs" / "one" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process_of=workplace)
    began = time.monotonic()
    assert process.wait(timeout=60) == 8, (workplace.path / "stderr.txt").read_text()[-2000:]
    assert time.monotonic() - began < 45
    made = len(workplace.lines("one"))
    checkpoint = find_latest(workplace.path / "runs" / "one" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == made
    assert json.loads((workplace.path / "runs" / "one" / "run.json").read_text())["status"] == "failed"
