"""Forward and backward passes of a step: traces end to end in one row, padded to the longest, or one by one.

Random traces of 200 to 2,000 tokens (log-uniform: many short, few long), an eighth of them trained, through a random
Qwen3 in float32. Every way is measured in a process of its own, on one thread and in seconds of the CPU, which a busy
machine changes least. Tokens are those of traces, padding not counted; memory is the peak above model and traces,
gradients included.

python -m bench.packing [--traces 32] [--budget 8192] [--width 384] [--layers 4] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from typing import Any

from agent_loop.types import Episode, Segment, SegmentSource, StopReason, TokenTrace
from envs.types import Task

WAYS = ("padded", "packed", "one by one")
SHORTEST, LONGEST = 200, 2000
"""Tokens of a trace."""
VOCAB = 4096
TURN = 32
"""Trained tokens of one turn; seven times as many follow from the tool."""


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def make_episode(index: int, rng: random.Random) -> Episode:
    length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    segments = []
    for i, start in enumerate(range(0, length, TURN)):
        is_last = start + TURN >= length
        source = SegmentSource.ASSISTANT if i % 8 == 7 or is_last else SegmentSource.TOOL
        segments.append(Segment(start=start, end=min(start + TURN, length), source=source, turn=i // 8))
    mask = [s.source is SegmentSource.ASSISTANT for s in segments for _ in range(s.start, s.end)]
    scores: list[float | None] = [-8.0 if trained else None for trained in mask]
    trace = TokenTrace(
        token_ids=[rng.randrange(VOCAB) for _ in mask],
        loss_mask=mask,
        sampling_logprobs=scores,
        teacher_logprobs=list(scores),
        segments=segments,
    )
    task = Task(messages=({"role": "user", "content": "?"},), id=f"task{index}")
    return Episode(id=str(index), env_id="bench", task=task, turns=[], traces=[trace], stop_reason=StopReason.LAST_TOOL)


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak and tokens of all micro-batches of a step; the second of two rounds, so that nothing is new."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from distill.batch import collate, items_of, split_micro_batches
    from distill.config import LossConfig
    from distill.rows import Objective, RowModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=max(1, arguments.width // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    rows = RowModel(model)
    packed = way == "packed"
    if not packed:
        model.set_attn_implementation(rows.attention)
    rng = random.Random(0)
    items = items_of([make_episode(i, rng) for i in range(arguments.traces)])
    groups = split_micro_batches(items, 1 if way == "one by one" else arguments.budget, packed=packed)
    objective = Objective(LossConfig(), sum(item.trace.num_trained for item in items))
    fed = 0
    before = peak_bytes()
    for _ in range(2):
        fed, loss_sum = 0, 0.0
        model.zero_grad(set_to_none=False)
        began = time.process_time()
        for group in groups:
            batch = collate(group, packed=packed)
            loss, _ = rows(batch, objective)
            loss.backward()
            fed += batch.input_ids_BT.numel()
            loss_sum += float(loss.detach())
        seconds = time.process_time() - began
    return {
        "way": way,
        "cpu_s": seconds,
        "mib": (peak_bytes() - before) / 2**20,
        "passes": len(groups),
        "tokens": sum(item.num_inputs for item in items),
        "fed": fed,
        "loss": loss_sum,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=__doc__)
    parser.add_argument("--traces", type=int, default=32)
    parser.add_argument("--budget", type=int, default=8192, help="optim.micro_batch_tokens")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="16 traces, budget 4096, width 256, 2 layers")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.traces, arguments.budget, arguments.width, arguments.layers = 16, 4096, 256, 2
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments)))
        return
    results = {}
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("traces", "budget", "width", "layers")]
    print(f"{'way':12}{'passes':>8}{'tokens/s':>10}{'peak MiB':>10}{'padding':>9}")
    for way in WAYS:
        command = [sys.executable, "-m", "bench.packing", *flags, "--way", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        r = results[way] = json.loads(done.stdout.splitlines()[-1])
        r["tokens_per_s"] = r["tokens"] / r["cpu_s"]
        r["padding"] = 1 - r["tokens"] / r["fed"]
        print(f"{way:12}{r['passes']:8}{r['tokens_per_s']:10,.0f}{r['mib']:10,.0f}{r['padding']:9.1%}")
    padded, packed = results["padded"], results["packed"]
    assert math.isclose(padded["loss"], packed["loss"], rel_tol=1e-3), (padded["loss"], packed["loss"])
    line = {
        "bench": "packing",
        "tokens": packed["tokens"],
        "padding_share": round(padded["padding"], 4),
        "packed_tokens_per_s": round(packed["tokens_per_s"]),
        "tokens_per_s_vs_padded": round(packed["tokens_per_s"] / padded["tokens_per_s"], 3),
        "memory_vs_padded": round(packed["mib"] / padded["mib"], 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
