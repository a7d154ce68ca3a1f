"""Per-row numbers of a step, reduced to one line. Names and meanings: docs/metrics.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from agent_loop.types import Episode, TokenClass
from distill.batch import TrainItem
from distill.metrics import Metrics
from distill.ranks import Ranks
from distill.types import Batch


class StepRows:
    """The rows of a step's micro-batches, kept on the CPU."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, batch: Batch, metrics_N: dict[str, torch.Tensor], *, counts: bool = True) -> None:
        """Rows of one micro-batch, with what `reverse_kl_loss` said of them; their names alone unless it counts."""
        part = {name: values.detach().cpu().double().numpy() for name, values in metrics_N.items()}
        part |= {
            "turn": batch.turns_N.numpy(),
            "class": batch.classes_N.numpy(),
            "episode": batch.episodes_N.numpy(),
        }
        self._parts.append(part if counts else {name: values[:0] for name, values in part.items()})

    def gather(self, ranks: Ranks) -> None:
        """Put the rows of all ranks together, on the leader."""
        names = list(self._parts[0])
        table_MN = np.stack([np.concatenate([part[name] for part in self._parts]) for name in names]).astype(np.float64)
        rows_MN = ranks.gather(table_MN)
        self._parts = [dict(zip(names, rows_MN, strict=True))]

    def largest_signal(self) -> float:
        """Largest absolute difference of student's and teacher's log-probability of a trained token, in nats;
        supervised, the largest -log p_student."""
        return max(
            float(np.abs(part["nll"] if "nll" in part else part["teacher_kl"]).max(initial=0.0)) for part in self._parts
        )

    def reduce(self, episodes: Sequence[Episode]) -> Metrics:
        """Means and percentiles over all rows; None where a number overflows."""
        rows = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        if "nll" in rows:
            return _supervised(rows)
        kl, mismatch = rows["teacher_kl"], rows["mismatch"]
        p50, p90, p99 = np.percentile(kl, [50, 90, 99])
        with np.errstate(over="ignore"):
            metrics = {
                "teacher_kl": kl.mean(),
                "teacher_kl/p50": p50,
                "teacher_kl/p90": p90,
                "teacher_kl/p99": p99,
                "teacher_kl/max": kl.max(),
                "teacher_kl/above_5": (np.abs(kl) > 5).mean(),
                "teacher_kl/k2": rows["k2"].mean(),
                "teacher_kl/k3": rows["k3"].mean(),
                "entropy": rows["entropy"].mean(),
                # The sampler's distribution is the reference: its tokens estimate KL(sampler || trainer).
                "mismatch_kl": (np.expm1(mismatch) - mismatch).mean(),
                "mismatch_kl/k1": -mismatch.mean(),
                "mismatch_kl/max": np.abs(mismatch).max(),
                "ratio": rows["ratio"].mean(),
                "ratio/clipped": rows["clipped"].mean(),
            }
        if "advantage_clipped" in rows:
            metrics["advantage/clipped"] = rows["advantage_clipped"].mean()
        for turn in np.unique(rows["turn"]):
            metrics[f"teacher_kl/turn_{turn:.0f}"] = kl[rows["turn"] == turn].mean()
        for index, token_class in enumerate(TokenClass):
            of_class = kl[rows["class"] == index]
            if len(of_class):
                metrics[f"teacher_kl/{token_class.value}"] = of_class.mean()
        sources = np.array([e.task.source for e in episodes])
        if len(set(sources)) > 1:
            row_sources = sources[rows["episode"].astype(np.int64)]
            for source in np.unique(row_sources):
                metrics[f"teacher_kl/{source}"] = kl[row_sources == source].mean()
        datasets = np.array([str(e.task.metadata.get("dataset") or e.env_id) for e in episodes])
        row_datasets = datasets[rows["episode"].astype(np.int64)]
        for dataset in np.unique(row_datasets):
            name = f"teacher_kl/{dataset}"
            # A data set called "answer" must not replace the number of the token class, or of a source of that name.
            metrics[f"teacher_kl/dataset_{dataset}" if name in metrics else name] = kl[row_datasets == dataset].mean()
        return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def token_shares(items: Sequence[TrainItem]) -> Metrics:
    """Share of the trained tokens that each source has, as they are counted, not weighed; nothing of one source."""
    counts: Counter[str] = Counter()
    for item in items:
        counts[item.episode.task.source] += item.trace.num_trained
    if len(counts) < 2:
        return {}
    return {f"train/token_share/{source}": count / counts.total() for source, count in sorted(counts.items())}


def _supervised(rows: dict[str, np.ndarray]) -> Metrics:
    """Of rows without a teacher."""
    metrics: Metrics = {"nll": float(rows["nll"].mean()), "entropy": float(rows["entropy"].mean())}
    for index, token_class in enumerate(TokenClass):
        of_class = rows["nll"][rows["class"] == index]
        if len(of_class):
            metrics[f"nll/{token_class.value}"] = float(of_class.mean())
    return metrics
