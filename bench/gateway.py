"""What it costs the run that workers sample through its gateway: its CPU a completion, HTTP and JSON included.

The policy behind the gateway answers at once, so that nothing else is measured. A second process asks, eight
completions at a time. Without workers the same question is a function call.

python -m bench.gateway [--completions 400]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence

from agent_loop.types import Completion, SamplingParams
from distill.gateway import Gateway, GatewayPolicy, connect

SIZES = ((1_000, 200), (4_000, 500), (16_000, 1_000))
"""Tokens of the prompt, and sampled ones."""
AT_ONCE = 8


class Instant:
    """A policy that has its answer already."""

    def __init__(self, num_tokens: int) -> None:
        self._completion = Completion(
            token_ids=tuple(range(100_000, 100_000 + num_tokens)),
            logprobs=(-0.123456789012345,) * num_tokens,
            finish_reason="length",
            policy_version=1,
        )

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        return self._completion

    async def aclose(self) -> None: ...


async def ask(base_url: str, key: str, name: str, num_prompt: int, completions: int) -> None:
    """The worker's side, in a process of its own; prints its CPU milliseconds a completion."""
    transport = connect(base_url, key)
    policy, prompt = GatewayPolicy(transport, name), list(range(100_000, 100_000 + num_prompt))

    async def some() -> None:
        for _ in range(completions // AT_ONCE):
            await policy.sample(prompt, SamplingParams(max_tokens=2048), key="1/t/0")

    before = time.process_time()
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    print(1000 * (time.process_time() - before) / completions)
    await transport.aclose()


async def measure(num_prompt: int, num_sampled: int, completions: int) -> dict[str, float]:
    gateway = Gateway()
    await gateway.start()
    name = gateway.offer(Instant(num_sampled))
    arguments = [gateway.base_url, gateway.key, name, str(num_prompt), str(completions)]
    before = time.process_time()
    asking = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.gateway", "--ask", *arguments, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await asking.communicate()
    ours = 1000 * (time.process_time() - before) / completions
    await gateway.aclose()
    return {"prompt": num_prompt, "sampled": num_sampled, "run_cpu_ms": ours, "worker_cpu_ms": float(printed)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--completions", type=int, default=400)
    parser.add_argument("--ask", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        base_url, key, name, num_prompt, completions = arguments.ask
        asyncio.run(ask(base_url, key, name, int(num_prompt), int(completions)))
        return
    rows = [asyncio.run(measure(prompt, sampled, arguments.completions)) for prompt, sampled in SIZES]
    print(f"{'prompt':>8} {'sampled':>8} {'run, CPU ms':>12} {'worker, CPU ms':>15}")
    for row in rows:
        print(f"{row['prompt']:>8} {row['sampled']:>8} {row['run_cpu_ms']:>12.2f} {row['worker_cpu_ms']:>15.2f}")
    print(json.dumps({"gateway": rows}))


if __name__ == "__main__":
    main()
