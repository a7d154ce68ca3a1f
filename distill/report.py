"""The end of a run: a table of before and after, and a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.rundir import evaluations, read_jsonl

WINDOW = 5
"""Steps in the moving mean of `teacher_kl`: single steps are noisy below 64 episodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One line of `evals.jsonl`: a model on the held-out tasks, at the temperature of training."""

    name: str
    """`student` or `teacher`."""
    step: int
    """Optimiser steps that the student had had."""
    episodes: int
    metrics: Mapping[str, float | int | None]

    @property
    def success(self) -> float | None:
        value = self.metrics.get("reward/success")
        return None if value is None else float(value)


def before_after(evaluations: Sequence[Evaluation], lines: Sequence[Mapping[str, Any]]) -> str:
    """The table that a run ends with."""
    student = [e for e in evaluations if e.name == "student"]
    teacher = next((e for e in evaluations if e.name == "teacher"), None)
    kls = [float(line["teacher_kl"]) for line in lines if line.get("teacher_kl") is not None]
    if not student:
        return _kl_line(kls)
    columns = [("before", student[0])]
    if len(student) > 1:
        columns.append(("after", student[-1]))
    if teacher is not None:
        columns.append(("teacher", teacher))
    rows = [
        ("success", "reward/success", "{:.1%}"),
        ("turns an episode", "rollout/num_turns", "{:.2f}"),
        ("sampled tokens an episode", "rollout/sampled_tokens_per_episode", "{:.1f}"),
        ("valid tool calls", "tool/valid_call_rate", "{:.1%}"),
        ("tool errors", "tool/error_rate", "{:.1%}"),
        ("cut short", "rollout/truncated", "{:.1%}"),
    ]
    width = max(len(title) for title, _, _ in rows)
    text = [f"{'':{width}}  " + "".join(f"{title:>10}" for title, _ in columns)]
    for title, name, form in rows:
        values = [evaluation.metrics.get(name) for _, evaluation in columns]
        text.append(f"{title:{width}}  " + "".join(f"{form.format(v) if v is not None else '-':>10}" for v in values))
    text.append(f"({student[-1].episodes} held-out episodes each)")
    text.append(_kl_line(kls))
    return "\n".join(text)


def _kl_line(kls: Sequence[float]) -> str:
    if len(kls) < 2 * WINDOW:
        return f"teacher_kl: {', '.join(f'{k:.4f}' for k in kls) or 'not computed'}"
    first, last = fmean(kls[:WINDOW]), fmean(kls[-WINDOW:])
    fall = f", {first / last:.1f}x down" if last > 0 else ""
    return f"teacher_kl, mean of the first and last {WINDOW} steps: {first:.4f} -> {last:.4f} nats a token{fall}"


def plot(run_dir: Path) -> Path:
    """Draw `teacher_kl` and success over the steps into `curve.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = read_jsonl(run_dir / "metrics.jsonl")
    steps = [line["step"] for line in lines if line.get("teacher_kl") is not None]
    kls = [float(line["teacher_kl"]) for line in lines if line.get("teacher_kl") is not None]
    figure, left = pyplot.subplots(figsize=(7, 4), dpi=130)
    left.plot(steps, kls, color="#9db8d9", linewidth=1, label="teacher_kl, each step")
    smooth = [fmean(kls[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(kls))]
    left.plot(steps, smooth, color="#1f4e8c", linewidth=2, label=f"teacher_kl, mean of {WINDOW}")
    left.axhline(0.0, color="#cccccc", linewidth=0.8)
    left.set_xlabel("optimiser step")
    left.set_ylabel("reverse KL to the teacher, nats a token")
    graded = [
        p for p in evaluations(run_dir) if p["name"] == "student" and p["metrics"].get("reward/success") is not None
    ]
    if graded:
        right = left.twinx()
        xs, ys = [p["step"] for p in graded], [p["metrics"]["reward/success"] for p in graded]
        right.plot(xs, ys, "o:", color="#c8641e", label="success, held-out (measured at the dots)")
        right.set_ylim(0, 1.02)
        right.set_ylabel("success on held-out tasks")
        handles = [*left.get_lines()[:2], *right.get_lines()]
        right.legend(handles=handles, loc="center right", frameon=False)
    else:
        left.legend(loc="upper right", frameon=False)
    figure.tight_layout()
    path = run_dir / "curve.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path
