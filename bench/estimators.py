"""Bias, variance and cost of the losses.

Bias and variance are exact expectations over every token that could have been sampled, of one position with 2,000
tokens: teacher logits N(0, spread^2), student = teacher + N(0, gap^2). Bias is |E g - g*| / |g*| and variance
E |g - E g|^2 / |g*|^2, against the gradient g* of the exact reverse KL; medians over draws.

python -m bench.estimators [--draws 50] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from distill.config import LossConfig
    from distill.types import Batch

SETTINGS = ((6.0, 1.0, 20), (6.0, 2.0, 20), (6.0, 1.0, 8), (3.0, 1.5, 64))
"""Spread, gap, K."""
TYPES = ("sampled", "topk", "full")


def batch_of(targets: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, top_k: int) -> Batch:
    """Rows of positions with teacher log-probabilities [N, V], or one [V] for all of them."""
    import torch

    from distill.types import Batch

    count = len(targets)
    zeros = torch.zeros(count, dtype=torch.int64)
    teacher_NV = teacher.expand(count, teacher.shape[-1])
    head = teacher.topk(top_k)
    return Batch(
        input_ids_BT=zeros[None],
        lengths_B=torch.tensor([count]),
        seq_N=zeros,
        pos_N=zeros,
        targets_N=targets,
        sampling_logprobs_N=student.expand(teacher_NV.shape).gather(-1, targets[:, None])[:, 0],
        teacher_logprobs_N=teacher_NV.gather(-1, targets[:, None])[:, 0],
        advantages_N=torch.zeros(count, dtype=student.dtype),
        weights_N=torch.ones(count, dtype=student.dtype),
        turns_N=zeros,
        classes_N=zeros,
        episodes_N=zeros,
        topk_ids_NK=head.indices.expand(count, top_k),
        topk_logprobs_NK=head.values.expand(count, top_k),
    )


def bias_and_variance(
    logits: torch.Tensor, teacher: torch.Tensor, config: LossConfig, top_k: int
) -> tuple[float, float]:
    import torch

    from distill.loss import reverse_kl_loss

    size = len(logits)
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    d = log_p - teacher
    exact = p * (d - (p * d).sum())
    if config.type == "full":  # the same for every token: one row will do
        p, targets = torch.ones(1, dtype=p.dtype), torch.zeros(1, dtype=torch.int64)
    else:
        targets = torch.arange(size)
    rows = len(targets)
    leaf = logits.expand(rows, size).clone().requires_grad_()
    batch = batch_of(targets, log_p, teacher, top_k)
    reverse_kl_loss(leaf, batch, config, rows, teacher.expand(rows, size)).loss.backward()
    assert leaf.grad is not None
    g = leaf.grad * rows
    mean = p @ g
    variance = float(p @ (g - mean).square().sum(-1))
    norm = float(exact.norm())
    return float((mean - exact).norm()) / norm, variance / norm**2


def milliseconds(kind: str, rows: int, vocab_size: int, top_k: int, repeats: int) -> float:
    """Forward and backward of the loss down to the logits, float32."""
    import torch

    from distill.config import LossConfig
    from distill.loss import reverse_kl_loss

    logits = torch.randn(rows, vocab_size)
    teacher = torch.randn(rows, vocab_size).log_softmax(-1)
    batch = batch_of(torch.randint(vocab_size, (rows,)), logits.log_softmax(-1), teacher, top_k)
    config = LossConfig(type=kind)  # type: ignore[arg-type]
    times = []
    for _ in range(repeats + 1):
        leaf = logits.clone().requires_grad_()
        began = time.perf_counter()
        reverse_kl_loss(leaf, batch, config, rows, teacher).loss.backward()
        times.append(time.perf_counter() - began)
    return 1000 * median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.estimators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="3 draws of 500 tokens, small timings")
    arguments = parser.parse_args()

    import torch

    from distill.config import LossConfig

    draws, size = (3, 500) if arguments.quick else (arguments.draws, 2000)
    result: dict[str, object] = {"bench": "estimators", "draws": draws, "vocab_size": size}
    print(f"{'spread':>6} {'gap':>4} {'K':>3} {'mass':>5}" + "".join(f"  {t + ' bias / variance':>25}" for t in TYPES))
    settings = []
    for spread, gap, top_k in SETTINGS:
        found: dict[str, list[tuple[float, float]]] = {t: [] for t in TYPES}
        masses = []
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(2, size, generator=generator, dtype=torch.float64)
            teacher = (noise[0] * spread).log_softmax(-1)
            logits = noise[0] * spread + noise[1] * gap
            masses.append(float(logits.softmax(-1)[teacher.topk(top_k).indices].sum()))
            for kind in TYPES:
                found[kind].append(bias_and_variance(logits, teacher, LossConfig(type=kind), top_k))  # type: ignore[arg-type]
        line: dict[str, float] = {"spread": spread, "gap": gap, "top_k": top_k, "mass": round(median(masses), 3)}
        text = f"{spread:6g} {gap:4g} {top_k:3d} {median(masses):5.2f}"
        for kind in TYPES:
            bias, variance = median(b for b, _ in found[kind]), median(v for _, v in found[kind])
            text += f"  {bias:14.1e} / {variance:8.2f}"
            line |= {f"{kind}_bias": bias, f"{kind}_variance": round(variance, 4)}
        gain = median(s[1] / k[1] for s, k in zip(found["sampled"], found["topk"], strict=True))
        print(f"{text}   top-k: {gain:.1f}x less")
        settings.append(line | {"topk_gain": round(gain, 2)})
    result["settings"] = settings

    print(f"\n{'rows':>6} {'vocab':>7} " + "".join(f" {t + ' ms':>11}" for t in TYPES))
    for rows, vocab_size in ((256, 512), (64, 8192)) if arguments.quick else ((2560, 512), (512, 32_000)):
        times = {t: milliseconds(t, rows, vocab_size, 20, 3 if arguments.quick else 9) for t in TYPES}
        print(f"{rows:6d} {vocab_size:7d} " + "".join(f" {times[t]:11.2f}" for t in TYPES))
        result |= {f"{t}_ms_{rows}x{vocab_size}": round(times[t], 3) for t in TYPES}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
