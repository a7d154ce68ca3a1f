"""Sampled tokens a second of our rollouts beside a bare load generator, on one vLLM (`bench.rollout --engine vllm`)."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from agent_loop.conversation import TokenActor
from agent_loop.episodes import EpisodeWriter
from agent_loop.policy import VllmPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episodes
from agent_loop.transport import HttpTransport
from agent_loop.types import Completion, SamplingParams
from bench.rollout import Looking
from distill.config import ServerConfig
from distill.serving.vllm import Launch, Machine, Server, launches
from envs.types import Limits, Task

CONCURRENCY = (1, 8, 32)
ROUNDS = 3
TURN_TOKENS = 48
MAX_CONTEXT = 1024

Asked = dict[str, list[tuple[list[int], int]]]
"""Requests of each episode, in order: prompt and number of tokens that came."""


class Recording(VllmPolicy):
    """Notes what was asked and how much came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: Asked = defaultdict(list)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        prompt = list(prompt_ids)
        completion = await super().sample(prompt, params, key=key)
        self.asked[key].append((prompt, len(completion.token_ids)))
        return completion


async def ours(renderer: Renderer, policy: Recording, concurrent: int) -> float:
    """Tokens a second of whole episodes, from render to file."""
    policy.asked.clear()
    limits = Limits(max_turns=2, max_turn_tokens=TURN_TOKENS, termination_policy="max_turns")
    jobs = [
        EpisodeJob(task=Task(id=str(i), messages=({"role": "user", "content": f"Find the number of page {i}."},)))
        for i in range(max(8, 2 * concurrent))
    ]
    with tempfile.TemporaryDirectory() as folder:
        writer = EpisodeWriter(Path(folder) / "episodes.jsonl")
        began = time.monotonic()
        played = await run_episodes(
            jobs,
            make_env=lambda: Looking(limits=limits),
            make_actor=lambda: TokenActor(renderer, policy),
            max_concurrent=concurrent,
            on_episode=writer.append,
        )
        writer.close()
        wall = time.monotonic() - began
    failed = [episode.error for episode in played if episode.error is not None]
    assert not failed, failed[0]
    return sum(episode.num_sampled for episode in played) / wall


async def bare(base_url: str, api_key: str, model: str, asked: Asked, concurrent: int) -> float:
    """Tokens a second of the same requests, their replies read and thrown away."""
    queue = iter(list(asked.values()))
    url = base_url.removesuffix("/v1") + "/inference/v1/generate"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {api_key}"}) as session:

        async def worker() -> None:
            for requests in queue:
                for prompt, count in requests:
                    sampling = {"max_tokens": count, "ignore_eos": True, "logprobs": 0, "detokenize": False, "seed": 1}
                    payload = {"model": model, "token_ids": prompt, "sampling_params": sampling}
                    async with session.post(url, json=payload) as response:
                        body = await response.json()
                        assert len(body["choices"][0]["token_ids"]) == count, body

        began = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(concurrent)))
        return sum(count for requests in asked.values() for _, count in requests) / (time.monotonic() - began)


async def measure(renderer: Renderer, base_url: str, api_key: str, model: str) -> dict[int, dict[str, float]]:
    transport = HttpTransport(base_url, api_key)
    policy = Recording(transport, model)
    rows = {}
    assert await policy.probe() == "generate", "start vLLM with --enable-scale-out"
    for concurrent in CONCURRENCY:
        await ours(renderer, policy, concurrent)  # fills the prefix cache, for both
        pairs = []
        for _ in range(ROUNDS):  # by turns: the machine's other load meets both
            mine = await ours(renderer, policy, concurrent)
            pairs.append((mine, await bare(base_url, api_key, model, policy.asked, concurrent)))
        rows[concurrent] = {
            "ours_tokens_per_s": statistics.median(mine for mine, _ in pairs),
            "bare_tokens_per_s": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(mine / other for mine, other in pairs),
        }
        shown = "  ".join(f"{name} {value:9.2f}" for name, value in rows[concurrent].items())
        print(f"{concurrent:5} at once: {shown}", flush=True)
    await policy.aclose()
    return rows


def launch(model: Path, folder: Path) -> Launch:
    """As a run starts its student."""
    [found] = launches(
        "student",
        model,
        ServerConfig(),
        log_dir=folder,
        machine=Machine.this(),
        first_share=0,
        num_shares=1,
        max_model_len=MAX_CONTEXT,
    )
    return found


def compare(model: Path | None, base_url: str | None, served_name: str) -> None:
    """Print a row a concurrency, and as the last line one JSON object."""
    if model is None:
        from distill.models import resolve

        model = Path(resolve("builtin:medbrowse-student"))
    renderer = load_renderer(model)
    if base_url is not None:
        rows = asyncio.run(measure(renderer, base_url, os.environ.get("VLLM_API_KEY", ""), served_name))
    else:
        with tempfile.TemporaryDirectory() as folder:
            server = Server(launch(model, Path(folder)))
            try:
                asyncio.run(server.wait_ready())
                rows = asyncio.run(measure(renderer, server.base_url, server.api_key, served_name))
            finally:
                asyncio.run(server.aclose())
    print(json.dumps({"bench": "rollout_vllm", "model": str(model.name), "rows": rows}))
