"""Ways to train the CPU default's weak student: distillation, reinforcement learning, imitation, and a mix.

    python -m bench.methods --keep runs/methods --plots docs/img         # three seeds; runs that are complete are kept
    python -m bench.methods --keep runs/methods --plot-only              # table and pictures of what is there
    python -m bench.methods --keep runs/methods --sweep                  # how the settings below were chosen

    distill   on-policy distillation: reverse KL to the teacher, no reward
    distill8  the same in groups of 8 episodes a task, as grpo has them
    grpo      0/1 reward alone, advantages within groups of 8; the teacher's scores are a metric
    sft       supervised fine-tuning on the teacher's episodes
    mix       the reverse KL and the reward together, groups of 2

All start from `builtin:medbrowse-student@SEED` and take 64 episodes a gradient step. The learning rate is constant
after its warm-up, so that every beginning of a run is a run of its own. The methods are driven by public commands, each
a process with one thread; seconds of wall time and of CPU are those of a run's processes, evaluations included.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.methods_report import RECORD, plots, report
from bench.methods_settings import EPISODES, METHODS, Flags, Method
from bench.serving import cpu_of_children, served

CONFIG = "configs/medbrowse_cpu.toml"
NUM_EVAL = 300
"""Held-out tasks of an evaluation."""
EVAL_SEED = 1_000_003
"""What `distill.run` adds to the seed where it evaluates: so that all methods are asked the same."""
TEACHER_EPISODES = 24 * EPISODES
"""For supervised training: one pass over them takes as many steps as distillation."""
SWEEP_SEED = 3
"""Is not among the seeds that are reported."""


@dataclass(slots=True)
class Work:
    """The processes of one run, one after the other, and what they took."""

    folder: Path
    commands: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    cpu: float = field(default_factory=cpu_of_children)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    commit: str = field(default_factory=lambda: commit())

    def run(self, module: str, *arguments: str | int | Path) -> None:
        """`python -m module arguments`, to its end."""
        command = ["-m", module, *map(str, arguments)]
        self.commands.append(shlex.join(["python", *command]))
        subprocess.run([sys.executable, *command], check=True, env=environment(), stdout=sys.stderr)

    @contextmanager
    def serving(self, model: Path, name: str) -> Iterator[str]:
        """The embedded engine on a free port of loopback; gives its address."""
        with served(model, name, environment=environment()) as server:
            self.commands.append(server.command)
            yield server.base_url

    def done(self, method: str, seed: int, **more: Any) -> None:
        """Write the record that makes the run complete."""
        record = {
            "method": method,
            "seed": seed,
            "commit": self.commit,
            "commands": self.commands,
            "wall_s": round(time.monotonic() - self.began, 1),
            "cpu_s": round(cpu_of_children() - self.cpu, 1),
            "load": [round(self.load, 1), round(os.getloadavg()[0], 1)],
            **more,
        }
        (self.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def commit() -> str:
    """Of the working tree; with a + where files that git tracks have changed since."""
    asked = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def as_arguments(flags: Flags) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run to make."""

    name: str
    """Of its method."""
    method: Method
    seed: int
    keep: Path
    """Folder of all runs."""
    folder: Path
    """Of this one."""
    recipe: str
    """Of the built-in student."""

    @property
    def student(self) -> str:
        return f"builtin:{self.recipe}@{self.seed}"

    @property
    def teacher(self) -> str:
        return f"builtin:medbrowse-teacher@{self.seed}"


def begin(folder: Path) -> Work:
    """An empty folder: what an interrupted run left is begun again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Work(folder)


def on_policy(job: Job) -> None:
    """`distill.run` evaluates by itself."""
    flags = {
        "output_dir": str(job.folder.parent), "run_id": job.folder.name, "seed": job.seed, "steps": job.method.steps,
        "student.model": job.student, "teacher.model": job.teacher, "optim.schedule": "constant",
        "eval.every": job.method.eval_every, "eval.num_tasks": NUM_EVAL, "checkpoint.every": job.method.steps,
        **job.method.flags,
    }  # fmt: skip
    work = begin(job.folder)
    work.run("distill.run", "--config", CONFIG, *as_arguments(flags))
    work.done(job.name, job.seed, flags=job.method.flags)


def teacher_episodes(folder: Path, job: Job) -> None:
    """Training tasks as the teacher plays them, token for token."""
    work = begin(folder)
    play(work, resolved(job.teacher), folder, "train", TEACHER_EPISODES, job.seed)
    work.done("teacher", job.seed)


def play(work: Work, model: Path, out: Path, split: str, num_tasks: int, seed: int) -> None:
    """A served model plays as `distill.run` has it played by the configuration."""
    with work.serving(model, "served") as url:
        work.run(
            "agent_loop.rollout", "--env", "medbrowse", "--model", "served", "--base-url", url, "--tokenizer", model,
            "--split", split, "--num-tasks", num_tasks, "--seed", seed, "--max-turns", 10, "--max-turn-tokens", 64,
            "--max-concurrent", 64, "--out", out,
        )  # fmt: skip


def supervised(job: Job) -> None:
    """The teacher's episodes, unless they are there; training on them; an evaluation of each checkpoint."""
    teacher = job.keep / f"teacher-seed{job.seed}"
    if not (teacher / RECORD).is_file():
        teacher_episodes(teacher, job)
    work = begin(job.folder)
    every = job.method.eval_every
    flags = {
        "student": job.student, "student.dtype": "float32", "seed": job.seed, "optim.betas": "0.9,0.95",
        "optim.warmup_steps": 3, "checkpoint.every": every, "checkpoint.keep_every": every, **job.method.flags,
    }  # fmt: skip
    work.run("distill.sft", "--episodes", teacher, "--out", job.folder, *as_arguments(flags))
    chosen = [(0, resolved(job.student))]
    for step in range(every, job.method.steps + 1, every):
        chosen.append((step, job.folder / f"checkpoints/step_{step:06d}/model"))
    for step, model in chosen:
        play(work, model, job.folder / f"eval/step_{step:06d}", "eval", NUM_EVAL, job.seed + EVAL_SEED)
    work.done(job.name, job.seed, flags=job.method.flags)


def resolved(name: str) -> Path:
    """The folder of a built-in model."""
    from distill import models

    return Path(models.resolve(name, progress=lambda line: print(line, file=sys.stderr)))


def measure(job: Job) -> None:
    """One run, unless it is there."""
    if (job.folder / RECORD).is_file():
        print(f"{job.folder.name}: complete, kept", file=sys.stderr)
        return
    print(f"{job.folder.name}: {json.dumps(dict(job.method.flags))}", file=sys.stderr)
    for model in (job.teacher, job.student):
        resolved(model)  # made before the clock starts
    if job.name == "sft":
        supervised(job)
    else:
        on_policy(job)


def varied(method: Method, flags: Flags) -> Method:
    """Short, and evaluated in the middle and at the end alone."""
    return replace(
        method, steps=method.sweep_steps, eval_every=method.sweep_steps // 2, flags={**method.flags, **flags}
    )


def named(flags: Flags) -> str:
    """Of a setting that is tried."""
    return "-".join(f"{key.split('.')[-1]}{value}" for key, value in flags.items() if key != "rollout.batch_size")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--keep", type=Path, default=Path("runs/methods"), help="folder of the runs (default: runs/methods)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="these methods")
    add("--student", default="medbrowse-student", metavar="NAME", help="built-in student (default: medbrowse-student)")
    add("--sweep", action="store_true", help=f"try settings on seed {SWEEP_SEED}, and report them")
    add("--plot-only", action="store_true", help="run nothing: table and pictures of the runs that are complete")
    add("--plots", type=Path, metavar="FOLDER", help="folder of the pictures (default: that of --keep)")
    arguments = parser.parse_args()
    keep: Path = arguments.keep.resolve()
    jobs = []
    for name in arguments.only:
        method = METHODS[name]
        chosen = [(f"{name}-seed{seed}", method, seed) for seed in arguments.seeds]
        if arguments.sweep:
            chosen = [(f"sweep/{name}-{named(flags)}", varied(method, flags), SWEEP_SEED) for flags in method.sweep]
        for folder, settings, seed in chosen:
            jobs.append(
                Job(name=name, method=settings, seed=seed, keep=keep, folder=keep / folder, recipe=arguments.student)
            )
    for job in [] if arguments.plot_only else jobs:
        measure(job)
    complete = [job.folder for job in jobs if (job.folder / RECORD).is_file()]
    report(complete, means=not arguments.sweep)
    if complete and not arguments.sweep:
        plots(complete, arguments.plots or keep)


if __name__ == "__main__":
    main()
