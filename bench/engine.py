"""Completions and tokens a second of the embedded engine, in process, on dialogues that grow turn by turn.

python -m bench.engine [--model DIR] [--concurrency 1 64 256] [--turns 4] [--prompt 130] [--max-tokens 20] [--new 25]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.serving.embedded import EmbeddedEngine


def tiny_engine() -> EmbeddedEngine:
    """Two random layers of width 64: the shape of the CPU default's models."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from distill.serving.embedded import EmbeddedEngine

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    return EmbeddedEngine(Qwen3ForCausalLM(config), None, name="bench")


async def post(engine: EmbeddedEngine, payload: Mapping[str, Any]) -> Any:
    body = json.dumps(payload).encode()
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await engine.app({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
    reply = json.loads(sent[1]["body"])
    if sent[0]["status"] != 200:
        raise RuntimeError(f"{sent[0]['status']}: {reply}")
    return reply


async def dialogues(engine: EmbeddedEngine, count: int, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """`count` dialogues at once; every turn waits for nobody but its own predecessor."""
    rng = random.Random(seed)
    vocab = engine.limits.vocab_size
    latencies: list[float] = []
    transcripts: list[list[int]] = []

    async def dialogue(n: int, prompt: list[int]) -> None:
        for turn in range(arguments.turns):
            began = time.perf_counter()
            reply = await post(
                engine,
                {
                    "prompt": prompt,
                    "max_tokens": arguments.max_tokens,
                    "seed": 1000 * n + turn,
                    "logprobs": 0,
                    "return_token_ids": True,
                    "ignore_eos": True,
                },
            )
            latencies.append(time.perf_counter() - began)
            prompt = [*prompt, *reply["choices"][0]["token_ids"], *rng.choices(range(vocab), k=arguments.new)]
        transcripts.append(prompt)

    prompts = [rng.choices(range(vocab), k=arguments.prompt) for _ in range(count)]
    began = time.perf_counter()
    await asyncio.gather(*(dialogue(n, prompt) for n, prompt in enumerate(prompts)))
    sampled_s = time.perf_counter() - began
    began = time.perf_counter()
    await asyncio.gather(*(post(engine, {"prompt": t, "max_tokens": 1, "prompt_logprobs": 0}) for t in transcripts))
    scored_s = time.perf_counter() - began
    completions = count * arguments.turns
    return {
        "concurrency": count,
        "completions_per_s": completions / sampled_s,
        "tokens_per_s": completions * arguments.max_tokens / sampled_s,
        "ms_per_turn": 1e3 * sum(latencies) / len(latencies),
        "scored_tokens_per_s": sum(map(len, transcripts)) / scored_s,
    }


async def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    from distill.serving.embedded import EmbeddedEngine

    engine = EmbeddedEngine.from_pretrained(arguments.model) if arguments.model else tiny_engine()
    try:
        results = []
        for count in arguments.concurrency:
            # Best of a few: what is left is the engine's, not the machine's.
            runs = [await dialogues(engine, count, arguments, seed) for seed in range(arguments.repeats)]
            results.append(max(runs, key=lambda run: run["tokens_per_s"]))
        return results
    finally:
        await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--model", help="model folder; default: a tiny random Qwen3")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=130, help="tokens of the first turn's prompt")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--new", type=int, default=25, help="tokens that each further turn adds to the dialogue")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    print("  ".join(f"{name:>19}" for name in results[0]))
    for result in results:
        print("  ".join(f"{value:19,.1f}" for value in result.values()))
    rounded = [{name: round(value, 2) for name, value in result.items()} for result in results]
    print(json.dumps({"bench": "engine", "model": arguments.model or "tiny", "results": rounded}))


if __name__ == "__main__":
    main()
