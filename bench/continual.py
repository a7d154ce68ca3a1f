"""New documents cost a model a skill; on-policy distillation from the model as it was wins it back.

    python -m bench.continual [--seeds 0 1 2] [--only documents ...] [--plot docs/img/continual.png]

The recipe of Thinking Machines, "On-Policy Distillation" (2025), section "Distillation for personalization", with this
project's public commands alone and on models of 130,000 parameters: `distill.sft --data` on invented documents
(bench/continual_data.py), then `distill.run --student.model THAT --teacher.model THE_ORIGINAL`. Every number is
measured by `agent_loop.rollout` against `distill.serving.embedded`: the skill on held-out tasks of `medbrowse`, the
knowledge on questions about the documents in `reasoning`. Temperature 1, as in training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import continual_data

ORIGINAL = "builtin:medbrowse-teacher"
SERVED = "model"
START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is. The defaults are those of docs/continual.md."""

    num_ships: int = 48
    epochs: int = 40
    sft_lr: float = 3e-3
    steps: int = 48
    """Of distillation."""
    lr: float = 1e-3
    """Of distillation."""
    every: int = 8
    """Steps between measurements."""
    num_tasks: int = 400
    """Of the skill."""
    samples: int = 10
    """Answers a question."""
    num_replayed: int = 600
    """Episodes of the original on training tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, measured."""

    line: str
    """Which recipe; `original` and `documents` are where several begin."""
    step: int
    """Optimiser steps since `documents`."""
    skill: float
    knowledge: float


@dataclass(frozen=True, slots=True)
class Lab:
    """One seed: its folder, and the commands."""

    folder: Path
    seed: int
    sizes: Sizes

    def run(self, name: str, module: str, *flags: object) -> None:
        """One of the project's commands, in a process of its own; what it says goes to `NAME.log`.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            code = subprocess.run([sys.executable, "-m", module, *map(str, flags)], stdout=out, stderr=out).returncode
        if code:
            raise RuntimeError(f"{module} ({name}) ended with {code}:\n{log.read_text()[-2000:]}")

    def sft(self, name: str, student: str | Path, *flags: object) -> Path:
        """Supervised fine-tuning; the folder of the trained model."""
        out = self.folder / name
        common = ["--out", out, "--seed", self.seed, "--checkpoint.every", 10**6, "--optim.schedule", "linear"]
        self.run(name, "distill.sft", "--student", student, *common, *flags)
        return models_in(out)[-1][1]

    def distil(self, name: str, student: Path, *flags: object) -> list[tuple[int, Path]]:
        """On-policy distillation from the original on its own tasks; (step, model) of every `every`-th step."""
        sizes = self.sizes
        self.run(
            name, "distill.run", "--env", "medbrowse", "--output_dir", self.folder, "--run_id", name,
            "--seed", self.seed, "--student.model", student, "--teacher.model", f"{ORIGINAL}@{self.seed}",
            "--steps", sizes.steps, "--optim.lr", sizes.lr, "--eval.at_start", "false", "--eval.at_end", "false",
            "--checkpoint.every", sizes.every, "--checkpoint.keep_every", sizes.every, *flags,
        )  # fmt: skip
        return models_in(self.folder / name)

    def measure(self, line: str, step: int, model: Path, questions: Path) -> Point:
        """Skill and knowledge of a model folder."""
        with served(model) as url:
            skill = self._success(url, model, f"{line}-{step}-skill", "--env", "medbrowse", "--num-tasks",
                                  self.sizes.num_tasks, "--max-turn-tokens", 64)  # fmt: skip
            known = self._success(url, model, f"{line}-{step}-knowledge", "--env", "reasoning", "--tasks", questions,
                                  "--samples", self.sizes.samples, "--max-turn-tokens", 24)  # fmt: skip
        point = Point(line=line, step=step, skill=skill, knowledge=known)
        print(f"seed {self.seed}: {line:24} step {step:4}: skill {skill:6.1%}, knowledge {known:6.1%}", file=sys.stderr)
        return point

    def _success(self, url: str, model: Path, name: str, *flags: object) -> float:
        out = self.folder / name
        where = ["--model", SERVED, "--base-url", url, "--tokenizer", model, "--seed", self.seed, "--out", out]
        self.run(name, "agent_loop.rollout", *where, *flags)
        return float(json.loads((out / "summary.json").read_text())["pass_at"]["pass@1"])


def models_in(run: Path) -> list[tuple[int, Path]]:
    """(step, model folder) of a run's checkpoints."""
    found = sorted((run / "checkpoints").glob("step_*/model"))
    return [(int(path.parent.name.removeprefix("step_")), path) for path in found]


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The embedded engine in a process of its own; its address.

    Raises:
        RuntimeError: it does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "distill.serving.embedded", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", SERVED, "--kv-cache-gib", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no server for {model}: {' '.join(command)}") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()
