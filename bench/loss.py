"""Seconds and extra peak memory of output head and loss, forward and backward, beside other ways to have a gradient.

One eighth of the positions is trained, in runs as turns of an episode are.

    full logits       logits of every position in float32, log_softmax, gather: what a plain training loop does
    plain head        head and `F.cross_entropy` on the trained rows: another loss, the least that a loss costs
    linear cross e.   `F.linear_cross_entropy` on the trained rows, in chunks of 512: the same loss, fused with the head
    ours              what a training step does (`distill/head.py`): reverse KL of the sampled tokens, all its metrics
    ours, topk        the same with 20 candidates of the teacher
    ours, frozen      as with LoRA: the head itself is not trained

Memory is the peak above what holds weight and hidden states, each way in a process of its own: on a CPU resident
memory, on a GPU what torch allocated. The head's own gradient is in it; `memory_ratio_vs_full_logits` leaves it out.
Times are taken by turns in one process, and their ratios are medians over rounds: other work on the machine slows all
ways alike. Only that of full logits is of their first and only run. TFLOP/s count the three products of the trained
rows; `share` is their part of what one large matrix product reaches here.

python -m bench.loss [--width 1024] [--tokens 4096] [--vocab 151936] [--device cpu] [--dtype float32] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FULL, PLAIN, LINEAR, OURS = "full logits", "plain head", "linear cross e.", "ours"
OURS_TOPK, OURS_FROZEN = "ours, topk", "ours, frozen"
TURN = 32
"""Trained tokens of one turn."""


@dataclass(frozen=True)
class Size:
    width: int
    tokens: int
    vocab_size: int
    device: str
    dtype: str

    @property
    def flags(self) -> list[str]:
        names = ("--width", "--tokens", "--vocab", "--device", "--dtype")
        values = (self.width, self.tokens, self.vocab_size, self.device, self.dtype)
        return [flag for name, value in zip(names, values, strict=True) for flag in (name, str(value))]

    @property
    def head_mib(self) -> float:
        """Of the head's own gradient."""
        return self.width * self.vocab_size * (2 if self.dtype == "bfloat16" else 4) / 2**20


class Work:
    """Hidden states, a head and trained rows; `run` goes forward and backward down to both."""

    def __init__(self, size: Size) -> None:
        import torch

        from bench.estimators import batch_of

        torch.manual_seed(0)
        dtype = getattr(torch, size.dtype)
        options = {"device": size.device, "dtype": dtype}
        self.device = torch.device(size.device)
        self.hidden_TH = torch.randn(size.tokens, size.width, **options).div_(size.width**0.5).requires_grad_()
        self.head = torch.nn.Linear(size.width, size.vocab_size, bias=False, **options)
        torch.nn.init.normal_(self.head.weight)
        starts = range(0, size.tokens - TURN, 8 * TURN)
        self.rows_N = torch.cat([torch.arange(start, start + TURN) for start in starts]).to(self.device)
        targets_N = torch.randint(size.vocab_size, (len(self.rows_N),))
        scores_NV = torch.full((1,), -11.0).expand(len(self.rows_N), size.vocab_size)
        self.batch = batch_of(targets_N, scores_NV, scores_NV, 20)
        self.targets_N = targets_N.to(self.device)

    def run(self, way: str) -> float:
        """Seconds."""
        self.hidden_TH.grad = self.head.weight.grad = None
        self.head.requires_grad_(way != OURS_FROZEN)
        self._wait()
        began = time.perf_counter()
        self._loss(way).backward()  # type: ignore[no-untyped-call]
        self._wait()
        return time.perf_counter() - began

    def _loss(self, way: str) -> torch.Tensor:
        import torch
        from torch.nn import functional as F

        from distill.config import LossConfig
        from distill.head import head_loss

        count = len(self.rows_N)
        if way == FULL:
            s_T = self.head(self.hidden_TH).float().log_softmax(-1)[self.rows_N, self.targets_N]
            return -((-11.0 - s_T.detach()) * s_T).sum() / count
        features_NH = self.hidden_TH[self.rows_N]
        if way == PLAIN:
            return F.cross_entropy(self.head(features_NH).float(), self.targets_N)
        if way == LINEAR:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
            loss: torch.Tensor = F.linear_cross_entropy(features_NH, self.head.weight, self.targets_N, options=options)
            return loss
        config = LossConfig(type="topk" if way == OURS_TOPK else "sampled")
        return head_loss(features_NH, self.head, self.batch, config, count).loss

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def matmul_tflops(self) -> float:
        """Of the best of five products of square matrices."""
        import torch

        size = 8192 if self.device.type == "cuda" else 2048
        one = torch.randn(size, size, device=self.device, dtype=self.head.weight.dtype)
        times = []
        for _ in range(5):
            self._wait()
            began = time.perf_counter()
            one @ one
            self._wait()
            times.append(time.perf_counter() - began)
        return 2 * size**3 / min(times) / 1e12


def first_run(size: Size, way: str) -> tuple[float, float]:
    """Seconds, and MiB of its peak above what was there before it."""
    import torch

    work = Work(size)
    if size.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return work.run(way), (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _peak_bytes()
    return work.run(way), (_peak_bytes() - before) / 2**20


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_own_process(size: Size, way: str) -> list[float]:
    command = [sys.executable, "-m", "bench.loss", "--first-run-of", way, *size.flags]
    found: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def seconds(work: Work, ways: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """By turns; a round before them warms up."""
    found = [{way: work.run(way) for way in ways} for _ in range(rounds + 1)]
    return {way: [times[way] for times in found[1:]] for way in ways}


def report(size: Size, ways: tuple[str, ...], rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    say(f"width {size.width}, {size.tokens} tokens, vocabulary {size.vocab_size}, {size.dtype} on {size.device}; ")
    say(f"the head's own gradient has {size.head_mib:.0f} MiB\n")
    first = {way: in_own_process(size, way) for way in ways}
    memory = {way: mib for way, (_, mib) in first.items()}
    work = Work(size)
    tflops = work.matmul_tflops()
    times = seconds(work, ways[1:], rounds) | {FULL: [first[FULL][0]] * rounds}
    ratios = {way: median(one / plain for one, plain in zip(times[way], times[PLAIN], strict=False)) for way in ways}
    operations = 6 * len(work.rows_N) * size.vocab_size * size.width
    ways_found = {}
    say(f"{'':16}{'seconds':>9}{'/ plain head':>14}{'extra MiB':>11}{'TFLOP/s':>9}{'share':>7}")
    for way in ways:
        rate = (operations * 2 / 3 if way == OURS_FROZEN else operations) / median(times[way]) / 1e12
        say(
            f"{way:16}{median(times[way]):9.3f}{ratios[way]:14.2f}{memory[way]:11.0f}"
            + ("" if way == FULL else f"{rate:9.2f}{rate / tflops:7.2f}")
        )
        ways_found[way] = {
            "seconds": round(median(times[way]), 4),
            "extra_mib": round(memory[way], 1),
            "time_ratio_vs_plain_head": round(ratios[way], 3),
            "tflops": None if way == FULL else round(rate, 3),
        }
    return {
        "bench": "loss",
        "width": size.width,
        "tokens": size.tokens,
        "rows": len(work.rows_N),
        "vocab_size": size.vocab_size,
        "device": size.device,
        "dtype": size.dtype,
        "matmul_tflops": round(tflops, 3),
        "memory_ratio_vs_full_logits": round((memory[OURS] - size.head_mib) / (memory[FULL] - size.head_mib), 4),
        "time_ratio_vs_plain_head": round(ratios[OURS], 3),
        "ways": ways_found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="width 256, 2,048 tokens, 3 rounds, without the variants")
    parser.add_argument("--first-run-of", metavar="WAY", help="print seconds and extra MiB of one run in this process")
    arguments = parser.parse_args()
    width, tokens, rounds = (256, 2048, 3) if arguments.quick else (arguments.width, arguments.tokens, arguments.rounds)
    size = Size(width, tokens, arguments.vocab, arguments.device, arguments.dtype)
    if arguments.first_run_of:
        print(json.dumps(first_run(size, arguments.first_run_of)))
        return
    ways = (FULL, PLAIN, LINEAR, OURS) + (() if arguments.quick else (OURS_TOPK, OURS_FROZEN))
    print(json.dumps(report(size, ways, rounds, print)))


if __name__ == "__main__":
    main()
