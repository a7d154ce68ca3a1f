"""What the runs of `bench.methods` reached: curves, where they come near the teacher, the table and the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.rundir import evaluations, read_jsonl

RECORD = "bench.json"
"""In a run's folder; there only when the run is complete."""
NEAR = 0.05
"""So far below the teacher is near it."""
EQUAL_STEPS, EQUAL_TOKENS = 24, 45_000
"""Where all methods are compared: near the end of pure distillation, by gradient steps and by trained tokens."""
LABELS = {
    "distill": "on-policy distillation",
    "distill8": "on-policy distillation, groups of 8",
    "mix": "mix of both, groups of 2",
    "sft": "SFT on teacher episodes",
    "grpo": "GRPO, 0/1 reward, groups of 8",
}
COLOURS = {"distill": "#1f4e8c", "distill8": "#7fa8d9", "mix": "#2e8b57", "sft": "#8a6fb0", "grpo": "#c8641e"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation, and what training had taken until then."""

    steps: float
    """Gradient steps: updates of the weights."""
    trained: float
    """Trained tokens: those whose gradient an update used, once an update."""
    handled: float
    """Tokens sampled for training, by whomever, and tokens sent to the teacher for scores that the loss reads."""
    success: float
    """Share of the held-out tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A complete run."""

    name: str
    """Of its folder."""
    record: dict[str, Any]
    """`bench.json`."""
    curve: Sequence[Point]
    """From the untrained student on."""
    teacher: float | None
    """The teacher's success; None where this run did not measure it."""
    mixed_groups: float | None
    """Mean over steps of the share of groups whose rewards differ; None without rewards or groups."""
    last_kl: float | None
    """Mean `teacher_kl` of the last five steps, in nats a token; None where nothing was scored."""

    @property
    def method(self) -> str:
        return str(self.record["method"])

    @property
    def seed(self) -> int:
        return int(self.record["seed"])


def crossing(curve: Sequence[Point], bar: float) -> Point | None:
    """The first evaluation at or above the bar whose next one, if there is one, is so too: one lucky evaluation is no
    crossing. None: there is none."""
    for point, after in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if min(point.success, after.success) >= bar:
            return point
    return None


def success_at(curve: Sequence[Point], amount: float, of: Callable[[Point], float]) -> float | None:
    """Success where `of` has reached `amount`, on the line between two evaluations. None: the run is shorter."""
    for before, after in pairwise(curve):
        if of(before) <= amount <= of(after):
            share = (amount - of(before)) / (of(after) - of(before))
            return before.success + share * (after.success - before.success)
    return None


def read_run(folder: Path) -> Run:
    """A complete run as its files tell it."""
    record = json.loads((folder / RECORD).read_text())
    lines = read_jsonl(folder / "metrics.jsonl")
    supervised = record["method"] == "sft"
    epochs = int(record["flags"].get("optim.epochs", 1))
    trained = [0, *accumulate(line["train/tokens"] * epochs for line in lines)]
    if supervised:
        # What the teacher sampled is what is trained on, each token anew in every pass.
        once = sum(line["train/tokens"] for line in lines if line["epoch"] == 1)
        handled = [min(tokens, once) for tokens in trained]
        success = {int(file.parent.name.split("_")[1]): pass_at_1(file) for file in folder.glob("eval/*/summary.json")}
        teacher = None
    else:
        scored = float(record["flags"].get("loss.teacher_tau", 1)) > 0
        handled = [
            0,
            *accumulate(line["rollout/sampled_tokens"] + (line["teacher/tokens"] if scored else 0) for line in lines),
        ]
        found = {(e["name"], e["step"]): e["metrics"]["reward/success"] for e in evaluations(folder)}
        success = {step: value for (name, step), value in found.items() if name == "student"}
        teacher = found.get(("teacher", 0))
    curve = [
        Point(steps=step * epochs, trained=trained[step], handled=handled[step], success=success[step])
        for step in sorted(success)
    ]
    mixed = [line["reward/mixed_groups"] for line in lines if line.get("reward/mixed_groups") is not None]
    return Run(
        name=folder.name,
        record=record,
        curve=curve,
        teacher=teacher,
        mixed_groups=fmean(mixed) if mixed else None,
        last_kl=None if supervised else fmean(line["teacher_kl"] for line in lines[-5:]),
    )


def pass_at_1(summary: Path) -> float:
    return float(json.loads(summary.read_text())["pass_at"]["pass@1"])


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One a run. The bar is that of the seed's teacher."""
    teachers = {run.seed: run.teacher for run in runs if run.teacher is not None}
    rows = []
    for run in runs:
        teacher = teachers.get(run.seed)
        near = None if teacher is None else crossing(run.curve, teacher - NEAR)
        last = run.curve[-1]
        rows.append(
            {
                "run": run.name,
                "method": run.method,
                "seed": run.seed,
                "teacher": teacher,
                "start": run.curve[0].success,
                "near_steps": near and near.steps,
                "near_trained": near and near.trained,
                "near_handled": near and near.handled,
                "at_equal_steps": success_at(run.curve, EQUAL_STEPS, lambda p: p.steps),
                "at_equal_tokens": success_at(run.curve, EQUAL_TOKENS, lambda p: p.trained),
                "best": max(point.success for point in run.curve),
                "final": last.success,
                "final_steps": last.steps,
                "final_trained": last.trained,
                "mixed_groups": run.mixed_groups,
                "last_kl": run.last_kl,
                "wall_min": run.record["wall_s"] / 60,
                "cpu_min": run.record["cpu_s"] / 60,
                "load": run.record["load"],
                "commit": run.record["commit"],
            }
        )
    return rows


MEANS = (
    "teacher", "start", "near_steps", "near_trained", "near_handled", "at_equal_steps", "at_equal_tokens", "final",
    "final_steps", "final_trained", "mixed_groups", "last_kl", "wall_min", "cpu_min",
)  # fmt: skip
"""Columns whose mean over seeds says something."""


def means_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One a method, over its seeds; None where a seed has no number."""
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means.append(
            {"method": method, "seeds": len(own)}
            | {
                name: None if any(row[name] is None for row in own) else fmean(row[name] for row in own)
                for name in MEANS
            }
        )
    return means


def report(folders: Sequence[Path], *, means: bool) -> None:
    """Print a table of the runs and, with `means`, one of the methods, and all as JSON in the last line."""
    rows = rows_of([read_run(folder) for folder in folders])
    if not rows:
        print("no complete run")
        return
    by_method = means_of(rows) if means else []
    for table in filter(None, (rows, by_method)):
        shown = [{name: text_of(value) for name, value in row.items()} for row in table]
        widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
        for row in ({name: name for name in widths}, *shown):
            print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()))
        print()
    print(json.dumps({"bench": "methods", "rows": rows, "means": by_method}))


def text_of(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def plots(folders: Sequence[Path], out: Path) -> None:
    """`results_steps.png` and `results_tokens.png`: thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = [read_run(folder) for folder in folders]
    bars = [run.teacher - NEAR for run in runs if run.teacher is not None]
    views: list[tuple[str, str, Callable[[Point], float]]] = [
        ("results_steps.png", "gradient steps (64 episodes each)", lambda p: p.steps),
        ("results_tokens.png", "trained tokens, thousands", lambda p: p.trained / 1000),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for file, label, of in views:
        figure, (begin, whole) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120)
        for axes in (begin, whole):
            for method in (name for name in LABELS if any(run.method == name for run in runs)):
                curves = [run.curve for run in runs if run.method == method]
                for curve in curves:
                    axes.plot(
                        [of(p) for p in curve], [p.success for p in curve], color=COLOURS[method], lw=0.6, alpha=0.4
                    )
                same = list(zip(*curves, strict=False))  # the seeds' evaluations after the same steps
                xs = [fmean(map(of, points)) for points in same]
                ys = [fmean(p.success for p in points) for points in same]
                axes.plot(xs, ys, color=COLOURS[method], lw=2, label=LABELS[method])
            if bars:
                axes.axhline(fmean(bars), color="#888888", lw=1, ls="--", label=f"teacher less {NEAR * 100:.0f} points")
            axes.set_xlabel(label)
        early = max(of(p) for run in runs for p in run.curve if p.steps <= EQUAL_STEPS)
        begin.set_xlim(0, 1.5 * early)
        begin.set_ylim(0, 1.02)
        begin.set_ylabel("success on held-out tasks")
        begin.legend(frameon=False, loc="lower right")
        whole.set_xlim(left=0)
        whole.set_ylim(0.8, 1.005)
        whole.set_title("to the end, from 80 % on", fontsize=10)
        figure.tight_layout()
        figure.savefig(out / file)
        pyplot.close(figure)
