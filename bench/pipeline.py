"""Seconds of a training step with rollouts and training in turns, and with rollouts one step ahead.

    python -m bench.pipeline [--quick] [--steps 14] [--rounds 2] [--latency 0.3]

The models and the environment of the CPU default, in three settings: everything in one process; the teacher in a
process of its own; and tools that answer after `--latency` seconds, which is what agents usually wait for. The built-in
models are made on first use, which takes minutes and is not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import envs
from bench.serving import served
from envs.medbrowse.env import MedBrowseEnv
from envs.tool_env import StepOutcome
from envs.types import AssistantMessage

CONFIG = "configs/medbrowse_cpu.toml"
TEACHER = "builtin:medbrowse-teacher"
WARM_UP = 2
"""Steps left out at the start: first calls allocate, and nothing is ahead yet."""
WIND_DOWN = 2
"""And at the end: nothing is left to play ahead."""
NAMES = ("time/step", "idle/trainer", "idle/rollout", "idle/teacher", "time/train", "staleness/mean", "teacher_kl")


class SlowTools(MedBrowseEnv):
    """The registry, far away: every turn's tools take half to one and a half times `latency_s`."""

    def __init__(self, latency_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._latency_s = latency_s

    async def astep(self, action: AssistantMessage) -> StepOutcome:
        await asyncio.sleep(self._latency_s * (0.5 + self.np_random.random()))
        return await super().astep(action)


def measure(max_staleness: int, flags: dict[str, Any], folder: Path) -> dict[str, float]:
    """One run; means over its steady steps."""
    from distill.config_load import load_config
    from distill.console import Console
    from distill.run import run_training

    changes = {"eval.at_start": False, "eval.at_end": False, "checkpoint.every": 10_000, "output_dir": str(folder)}
    name = f"{time.monotonic_ns()}"
    loaded = load_config([CONFIG], changes | flags | {"rollout.max_staleness": max_staleness, "run_id": name})
    asyncio.run(run_training(loaded, Console(quiet=True), None))
    lines = [json.loads(text) for text in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {name: fmean(line[name] for line in lines[WARM_UP:-WIND_DOWN]) for name in NAMES}


@contextmanager
def served_teacher() -> Iterator[dict[str, Any]]:
    """The teacher's engine in a process of its own; what the configuration has to say."""
    from distill import models

    with served(models.resolve(TEACHER), TEACHER) as server:
        yield {"teacher.base_url": server.base_url}


def compare(rounds: int, flags: dict[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    """In turns and ahead, alternately; medians over the rounds."""
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(rounds):
        for max_staleness, runs in found.items():
            runs.append(measure(max_staleness, flags, folder))
    turns, ahead = ({name: median(run[name] for run in runs) for name in NAMES} for runs in found.values())
    return {"in_turns": turns, "ahead": ahead}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small steps, one round, under a minute")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.3, help="mean seconds of a turn's tools in the slow setting")
    arguments = parser.parse_args()
    envs.register("bench_slow_tools", SlowTools)
    quick = arguments.quick
    flags: dict[str, Any] = {"env": "bench_slow_tools", "steps": 8 if quick else arguments.steps}
    flags |= {"tasks.num_train": 500, "optim.warmup_steps": 0, "optim.lr": 1e-4}
    if quick:
        flags["rollout.batch_size"] = 24
    rounds = 1 if quick else arguments.rounds
    slow = {"env_args.latency_s": arguments.latency}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        rows["one process"] = compare(rounds, flags, folder)
        if not quick:
            with served_teacher() as served:
                rows["teacher in its own"] = compare(rounds, flags | served, folder)
        rows["slow tools"] = compare(rounds, flags | slow, folder)
    columns = ("trainer idle", "rollout idle", "teacher idle", "updates old")
    print(f"{'':20} {'':9} {'s/step':>7} " + " ".join(f"{column:>13}" for column in columns))
    ratios = {}
    for name, row in rows.items():
        for mode, values in row.items():
            idle = [values[f"idle/{role}"] / values["time/step"] for role in ("trainer", "rollout", "teacher")]
            shares = " ".join(f"{share:13.0%}" for share in idle)
            print(f"{name:20} {mode:9} {values['time/step']:7.3f} {shares} {values['staleness/mean']:13.2f}")
        ratios[name] = row["in_turns"]["time/step"] / row["ahead"]["time/step"]
        print(f"{name:20} in turns / ahead: {ratios[name]:.2f}")
    result = {
        "bench": "pipeline",
        "quick": quick,
        "steps": flags["steps"],
        "latency_s": arguments.latency,
        **{f"speedup_{name.replace(' ', '_')}": round(value, 3) for name, value in ratios.items()},
        "rows": {n: {m: {k: round(v, 4) for k, v in vs.items()} for m, vs in r.items()} for n, r in rows.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
