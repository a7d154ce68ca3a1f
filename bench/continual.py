"""New documents cost a model a skill; on-policy distillation from the model as it was wins it back.

    python -m bench.continual [--seeds 0 1 2] [--parts recipe documents ...] [--set lr=3e-4 ...] [--keep FOLDER]

The recipe of Thinking Machines, "On-Policy Distillation" (2025), part on personalization and continual learning, with
this project's public commands on models of 130,000 parameters: `distill.sft --data` on invented documents
(bench/continual_data.py) and some episodes of the model's own, then `distill.run` with two teachers: the original for
the old tasks, the fine-tuned model for questions about the documents. Skill: success on held-out tasks of `medbrowse`.
Knowledge: answers in `reasoning` to the questions in words that were never trained on. Both are sampled at temperature
1. The other parts are what one might do instead. What is in FOLDER already is read, not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import continual_data
from bench.serving import cpu_of_children, served

ORIGINAL = "builtin:medbrowse-teacher"
SERVED = "model"
CACHE = ("--kv-cache-gib", "1")
NEVER = 10**6
BATCH = 64
"""Episodes of a step of distillation from one teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is. The defaults are those of docs/continual.md."""

    num_ships: int = 24
    num_replayed: int = 60
    """Training tasks that the original plays; its episodes are mixed with the documents."""
    epochs: int = 24
    sft_lr: float = 2e-3
    warmup: int = 10
    """Steps, of fine-tuning."""
    steps: int = 120
    """Of distillation."""
    lr: float = 2e-3
    """Of distillation."""
    every: int = 24
    """Steps between measurements."""
    num_tasks: int = 200
    """That measure the skill."""
    samples: int = 4
    """Answers a question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, measured."""

    line: str
    """What was done."""
    step: int
    """Optimiser steps of distillation."""
    skill: float
    knowledge: float


@dataclass(frozen=True, slots=True)
class Lab:
    """One seed: its folder, and the commands."""

    folder: Path
    seed: int
    sizes: Sizes

    def original(self) -> Path:
        """The model with the skill; made on first use."""
        from distill import models

        return Path(models.resolve(f"{ORIGINAL}@{self.seed}"))

    def write(self) -> continual_data.Files:
        """The documents and questions of this seed."""
        return continual_data.write(self.folder / "data", num_ships=self.sizes.num_ships, seed=self.seed)

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

    def fine_tune(self, name: str, student: Path, *flags: object) -> Path:
        """`distill.sft`; the folder of the trained model."""
        out = self.folder / name
        common = ["--student", student, "--out", out, "--seed", self.seed, "--checkpoint.every", NEVER]
        self.run(name, "distill.sft", *common, "--optim.schedule", "linear", *flags)
        return checkpoints(out)[-1][1]

    def distil(self, name: str, student: Path, questions: Path, *flags: object) -> list[Point]:
        """`distill.run` from the original on the skill's own tasks; the student's own point, and those of every
        `every`-th step.

        Args:
            flags: of further sources.
        """
        sizes = self.sizes
        self.run(
            name, "distill.run", "--env", "medbrowse", "--output_dir", self.folder, "--run_id", name,
            "--seed", self.seed, "--student.model", student, "--teacher.model", f"{ORIGINAL}@{self.seed}",
            "--rollout.batch_size", 2 * BATCH if flags else BATCH,
            "--sources.old.env", "medbrowse", "--steps", sizes.steps, "--optim.lr", sizes.lr,
            "--eval.num_tasks", sizes.num_tasks, "--eval.teacher", "false", "--eval.every", sizes.every,
            "--checkpoint.every", sizes.every, "--checkpoint.keep_every", sizes.every, *flags,
        )  # fmt: skip
        run = self.folder / name
        skill = {}
        for text in (run / "evals.jsonl").read_text().splitlines():
            line = json.loads(text)
            skill[line["name"], line["step"]] = float(line["metrics"]["reward/success"])  # `old` alone is evaluated
        points = [self.point(name, 0, student, questions, skill["student", 0])]
        for step, model in checkpoints(run):
            points.append(self.point(name, step, model, questions, skill["student", step]))
        return points

    def point(self, line: str, step: int, model: Path, questions: Path, skill: float | None = None) -> Point:
        """Measure a model folder.

        Args:
            skill: where a run has measured it already.
        """
        name = f"{line}-{step}"
        with served(model, SERVED, *CACHE) as server:
            if skill is None:
                tasks = ("--num-tasks", self.sizes.num_tasks, "--max-turn-tokens", 64)
                skill = self._success(f"{name}-skill", server.base_url, model, "--env", "medbrowse", *tasks)
            asked = ("--tasks", questions, "--samples", self.sizes.samples, "--max-turn-tokens", 16)
            knowledge = self._success(f"{name}-knowledge", server.base_url, model, "--env", "reasoning", *asked)
        print(
            f"seed {self.seed}: {name:20} skill {skill:6.1%}, knowledge {knowledge:6.1%}", file=sys.stderr, flush=True
        )
        return Point(line=line, step=step, skill=skill, knowledge=knowledge)

    def _success(self, name: str, url: str, model: Path, *flags: object) -> float:
        out = self.folder / name
        where = ["--model", SERVED, "--base-url", url, "--tokenizer", model, "--seed", self.seed, "--out", out]
        self.run(name, "agent_loop.rollout", *where, *flags)
        return float(json.loads((out / "summary.json").read_text())["pass_at"]["pass@1"])

    def play(self, name: str, model: Path) -> Path:
        """Episodes of a model on training tasks of the skill."""
        import envs
        from envs.dataset import write_tasks

        tasks = self.folder / f"{name}-tasks.jsonl"
        write_tasks(tasks, envs.make("medbrowse").default_tasks("train", self.sizes.num_replayed))
        with served(model, SERVED, *CACHE) as server:
            self._success(name, server.base_url, model, "--env", "medbrowse", "--tasks", tasks, "--max-turn-tokens", 64)
        return self.folder / name


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, model folder) of a run's checkpoints."""
    found = sorted((run / "checkpoints").glob("step_*/model"))
    return [(int(path.parent.name.removeprefix("step_")), path) for path in found]


def recipe(lab: Lab) -> list[Point]:
    """Documents with some of the original's episodes among them; then distillation from the original on the old tasks
    and from the fine-tuned model on the documents' dialogues, as many of these as of those."""
    original, files = lab.original(), lab.write()
    before = lab.point("original", 0, original, files.questions)
    trained = tuned(lab)
    known = ("--sources.new.env", "reasoning", "--sources.new.tasks", files.asked, "--sources.new.teacher", "tuned")
    both = (*known, "--teachers.tuned.model", trained, "--loss.source_balance", 0.5)
    return [before, *lab.distil("distilled", trained, files.questions, *both)]


def alone(lab: Lab) -> list[Point]:
    """The same from the original alone: nothing speaks for the new knowledge."""
    files = lab.write()
    return lab.distil("alone", tuned(lab), files.questions)


def tuned(lab: Lab) -> Path:
    """The model after the documents; made once."""
    if not (lab.folder / "mixed").is_dir():
        original = lab.original()
        episodes = lab.play("replay", original)
        return lab.fine_tune("mixed", original, *of_documents(lab.write(), lab.sizes), "--episodes", episodes)
    [(_, model)] = checkpoints(lab.folder / "mixed")
    return model


def documents(lab: Lab) -> list[Point]:
    """The same with nothing but the documents."""
    files = lab.write()
    trained = lab.fine_tune("documents", lab.original(), *of_documents(files, lab.sizes))
    return lab.distil("documents-distilled", trained, files.questions)


def gentle(lab: Lab) -> list[Point]:
    """Nothing but the documents, at half the learning rate."""
    files = lab.write()
    trained = lab.fine_tune("gentle", lab.original(), *of_documents(files, lab.sizes, lr=lab.sizes.sft_lr / 2))
    return lab.distil("gentle-distilled", trained, files.questions)


def adapter(lab: Lab) -> list[Point]:
    """Nothing but the documents, into a LoRA adapter, at four times the learning rate."""
    files, merged = lab.write(), lab.folder / "adapter-merged"
    lora = ("--student.lora.rank", 16, "--student.lora.alpha", 32)
    lab.fine_tune("adapter", lab.original(), *of_documents(files, lab.sizes, lr=4 * lab.sizes.sft_lr), *lora)
    lab.run("adapter-merge", "distill.export", lab.folder / "adapter", "--out", merged, "--dtype", "float32")
    return lab.distil("adapter-distilled", merged, files.questions)


def imitation(lab: Lab) -> list[Point]:
    """In place of distillation from the original, as many updates on as many of its episodes, off policy."""
    sizes, files = lab.sizes, lab.write()
    damaged = tuned(lab)
    epochs = -(-BATCH * sizes.steps // sizes.num_replayed)
    flags = ("--episodes", lab.folder / "replay", "--epochs", epochs, "--batch-size", BATCH, "--lr", sizes.lr)
    return [lab.point("imitation", sizes.steps, lab.fine_tune("imitation", damaged, *flags), files.questions)]


PARTS = {part.__name__: part for part in (recipe, alone, documents, gentle, adapter, imitation)}


def of_documents(files: continual_data.Files, sizes: Sizes, *, lr: float | None = None) -> Sequence[object]:
    """Flags of fine-tuning on the documents."""
    rate = sizes.sft_lr if lr is None else lr
    return ("--data", files.documents, "--epochs", sizes.epochs, "--lr", rate, "--optim.warmup_steps", sizes.warmup)


def made(lab: Lab, name: str) -> dict[str, Any]:
    """A part's points and what they cost; from `NAME.json` in the lab's folder if it is there."""
    file = lab.folder / f"{name}.json"
    if not file.is_file():
        lab.folder.mkdir(parents=True, exist_ok=True)
        began, before = time.monotonic(), cpu_of_children()
        points = [asdict(point) for point in PARTS[name](lab)]
        cost = {"minutes": (time.monotonic() - began) / 60, "cpu_minutes": (cpu_of_children() - before) / 60}
        result = {"part": name, "seed": lab.seed, "points": points, **{k: round(v, 2) for k, v in cost.items()}}
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def plot(parts: Sequence[dict[str, Any]], path: Path) -> None:
    """Skill and knowledge over the recipe's stages, each seed thin and their mean thick; `alone` dotted."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    seeds = [part["points"] for part in parts if part["part"] == "recipe"]
    labels = ["original", "documents\nlearnt"]
    labels += [f"{point['step']}" for point in seeds[0][2:]]
    alone = [part["points"] for part in parts if part["part"] == "alone"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130)
    for name, colour in (("skill", "#1f4e8c"), ("knowledge", "#c8641e")):
        rows = [[100 * point[name] for point in points] for points in seeds]
        for row in rows:
            axes.plot(row, color=colour, linewidth=0.7, alpha=0.45)
        for points in alone:
            values, label = [100 * point[name] for point in points], f"{name}, from the original alone"
            axes.plot(range(1, len(values) + 1), values, ":", color=colour, linewidth=1.6, label=label)
        title = "old skill: success on held-out tasks" if name == "skill" else "new knowledge: right answers"
        axes.plot([fmean(column) for column in zip(*rows, strict=True)], "o-", color=colour, linewidth=2, label=title)
    axes.axvspan(1, len(labels) - 1, color="#f1f1f1", zorder=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("then: steps of on-policy distillation", loc="right")
    axes.set_ylabel("per cent, temperature 1")
    axes.set_ylim(-3, 103)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.continual", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["recipe"], help="default: recipe")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=NUMBER", help="of Sizes, such as steps=48 lr=3e-4")
    parser.add_argument("--keep", type=Path, help="keep runs, models and results here")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sizes = Sizes(**{key: json.loads(value) for key, _, value in (pair.partition("=") for pair in arguments.set)})
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)).absolute()
        labs = [Lab(folder / f"seed{seed}", seed, sizes) for seed in arguments.seeds]
        parts = [made(lab, name) for name in arguments.parts for lab in labs]
    print(f"{'seed':>4} {'':12} {'step':>5} {'skill':>7} {'knowledge':>10}")
    for part in parts:
        for point in part["points"]:
            values = f"{point['step']:5} {point['skill']:7.1%} {point['knowledge']:10.1%}"
            print(f"{part['seed']:4} {point['line']:12} {values}")
        print(f"     {part['part']}: {part['minutes']} minutes, {part['cpu_minutes']} CPU minutes")
    if arguments.plot:
        plot(parts, arguments.plot)
    print(json.dumps({"bench": "continual", "sizes": asdict(sizes), "parts": parts}))


if __name__ == "__main__":
    main()
