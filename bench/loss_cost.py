"""Seconds and extra peak memory of output head and loss, forward and backward, float32 on the CPU.

One eighth of the positions is trained, in runs as turns of an episode are. Every way is measured in a process of its
own; memory is the peak above what holds weight and hidden states, and includes the gradient of the head itself.

    all positions      logits of every position, log_softmax, gather: what a plain training loop does
    trained rows       `reverse_kl_loss` on the logits of the trained rows, one backward pass
    slices             what `Student.train_step` does: rows in slices, a backward pass each
    cross entropy      `F.cross_entropy` on the trained rows: another loss, the least that a loss costs
    linear cross e.    `F.linear_cross_entropy` on the trained rows, in chunks: the same loss, fused with the head

python -m bench.loss_cost [--width 1024] [--tokens 4096] [--vocab 151936] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WAYS = ("all positions", "trained rows", "slices", "cross entropy", "linear cross e.")
TURN = 32
"""Trained tokens of one turn."""


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def work_of(way: str, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, rows_N: torch.Tensor) -> Callable[[], None]:
    """Forward and backward down to the hidden states and the head's weight."""
    import torch
    from torch.nn import functional as F

    from bench.loss import batch_of
    from distill.config import LossConfig
    from distill.loss import reverse_kl_loss
    from distill.rows import MAX_LOGITS, _slice

    tokens, vocab_size = len(hidden_TH), len(weight_VH)
    count = len(rows_N)
    targets_N = torch.randint(vocab_size, (count,))
    scores_NV = torch.full((1,), -11.0).expand(count, vocab_size)
    batch = batch_of(targets_N, scores_NV, scores_NV, 0)
    config = LossConfig()

    def all_positions() -> None:
        targets_T = torch.zeros(tokens, dtype=torch.int64)
        targets_T[rows_N] = targets_N
        mask_T = torch.zeros(tokens)
        mask_T[rows_N] = 1.0
        s_T = (hidden_TH @ weight_VH.T).log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
        (-(mask_T * (-11.0 - s_T.detach()) * s_T).sum() / count).backward()

    def trained_rows() -> None:
        reverse_kl_loss(hidden_TH[rows_N] @ weight_VH.T, batch, config, count).loss.backward()

    def slices() -> None:
        features_NH = hidden_TH[rows_N]
        leaf_NH = features_NH.detach().requires_grad_()
        size = max(1, MAX_LOGITS // vocab_size)
        for start in range(0, count, size):
            part = _slice(batch, start, start + size)
            reverse_kl_loss(leaf_NH[start : start + size] @ weight_VH.T, part, config, count).loss.backward()
        features_NH.backward(leaf_NH.grad)

    def cross_entropy() -> None:
        F.cross_entropy(hidden_TH[rows_N] @ weight_VH.T, targets_N).backward()

    def linear_cross_entropy() -> None:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        F.linear_cross_entropy(hidden_TH[rows_N], weight_VH, targets_N, options=options).backward()

    works = (all_positions, trained_rows, slices, cross_entropy, linear_cross_entropy)
    return dict(zip(WAYS, works, strict=True))[way]


def measure(way: str, width: int, tokens: int, vocab_size: int) -> dict[str, float]:
    """Seconds (the best of two, the first one warms up) and extra peak MiB (of the first)."""
    import torch

    torch.manual_seed(0)
    hidden_TH = (torch.randn(tokens, width) / width**0.5).requires_grad_()
    weight_VH = torch.randn(vocab_size, width).requires_grad_()
    rows_N = torch.cat([torch.arange(start, start + TURN) for start in range(0, tokens - TURN, 8 * TURN)])
    work = work_of(way, hidden_TH, weight_VH, rows_N)
    before = peak_bytes()
    times = []
    for i in range(2):
        hidden_TH.grad = weight_VH.grad = None
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        if i == 0:
            extra = (peak_bytes() - before) / 2**20
    return {"seconds": round(min(times), 3), "extra_mib": round(extra, 1), "rows": len(rows_N)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--quick", action="store_true", help="width 256, 2048 tokens, vocabulary 32,000")
    parser.add_argument("--way", choices=WAYS, help="measure this one only, in this process")
    arguments = parser.parse_args()
    width, tokens, vocab_size = arguments.width, arguments.tokens, arguments.vocab
    if arguments.quick:
        width, tokens, vocab_size = 256, 2048, 32_000
    if arguments.way:
        print(json.dumps(measure(arguments.way, width, tokens, vocab_size)))
        return
    result: dict[str, object] = {"bench": "loss_cost", "width": width, "tokens": tokens, "vocab_size": vocab_size}
    print(f"width {width}, {tokens} tokens, vocabulary {vocab_size}\n\n{'':18}{'seconds':>9}{'extra MiB':>11}")
    sizes = ["--width", str(width), "--tokens", str(tokens), "--vocab", str(vocab_size)]
    for way in WAYS:
        command = [sys.executable, "-m", "bench.loss_cost", "--way", way, *sizes]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"{way:18}{found['seconds']:9.2f}{found['extra_mib']:11.0f}")
        result[way] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
