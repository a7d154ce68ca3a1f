"""What a model turn costs on the client, against an instant server in another process or a real vLLM.

    python -m bench.rollout [--concurrency 1 32 256] [--turns 4]
    python -m bench.rollout --engine vllm [--model FOLDER]              starts vLLM here; default: the CPU student
    python -m bench.rollout --engine vllm --model FOLDER --base-url http://HOST:8000/v1 --served-name NAME

Episodes of `--turns` model calls with one tool call each. All that a training rollout does is included: rendering,
cleaning, token ids, masks, log-probabilities, parsing, the tool, the environment, the trace's checks, and the episode
file. CPU is the client process's own, user and system. With vLLM the figure is sampled tokens a second, beside a bare
load generator that sends the same prompts and takes as many tokens from the same server (bench/vllm_load.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from agent_loop.conversation import TokenActor
from agent_loop.episodes import EpisodeWriter
from agent_loop.policy import VllmPolicy
from agent_loop.renderer import load_renderer
from agent_loop.rollout import EpisodeJob, run_episodes
from agent_loop.transport import HttpTransport
from envs.tool_env import ToolEnv
from envs.types import Limits, Task
from tools.tool import Tool, tool

PAGE = "A page of some length, as a tool returns it. " * 10


@tool
async def look(query: str) -> str:
    """Look something up.

    Args:
        query: what to look up.
    """
    return PAGE


class Looking(ToolEnv):
    def tools(self) -> list[Tool]:
        return [look]


def serve(ids: list[int], port: Any) -> None:
    """Answer every completion at once with the same call, in vLLM's format."""
    from aiohttp import web

    body = {
        "id": "c",
        "object": "text_completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "",
                "finish_reason": "stop",
                "token_ids": ids,
                "logprobs": {
                    "tokens": [f"token_id:{i}" for i in ids],
                    "token_logprobs": [-0.5] * len(ids),
                    "top_logprobs": None,
                    "text_offset": [],
                },
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": len(ids), "total_tokens": 1 + len(ids)},
    }
    text = json.dumps(body).encode()

    async def complete(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=text, content_type="application/json")

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/completions", complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.value = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        await asyncio.Event().wait()

    asyncio.run(main())


async def measure(renderer: Any, base_url: str, *, concurrent: int, episodes: int, turns: int) -> dict[str, float]:
    """Turns a second and client CPU a turn at one concurrency."""
    transport = HttpTransport(base_url)
    policy = VllmPolicy(transport, "m")
    task = Task(id="t", messages=({"role": "user", "content": "Find the number of the page."},))
    jobs = [EpisodeJob(task=task, sample_index=i) for i in range(episodes)]
    with tempfile.TemporaryDirectory() as folder:
        writer = EpisodeWriter(Path(folder) / "episodes.jsonl")
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        played = await run_episodes(
            jobs,
            make_env=lambda: Looking(limits=Limits(max_turns=turns)),
            make_actor=lambda: TokenActor(renderer, policy),
            max_concurrent=concurrent,
            on_episode=writer.append,
        )
        writer.close()
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    await policy.aclose()
    count = sum(len(e.turns) for e in played)
    assert count == episodes * turns, [e.error for e in played if e.error][:1]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"turns_per_s": count / wall, "cpu_ms_per_turn": 1000 * cpu / count, "episodes_per_s": episodes / wall}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: the tiny one of the tests)")
    parser.add_argument("--engine", choices=["instant", "vllm"], default="instant")
    parser.add_argument("--model", type=Path, help="folder of the model that vLLM serves (default: the CPU student)")
    parser.add_argument("--base-url", help="of a vLLM that runs; its key, if any, in VLLM_API_KEY")
    parser.add_argument("--served-name", default="student")
    arguments = parser.parse_args()
    if arguments.engine == "vllm":
        from bench.vllm_load import compare

        compare(arguments.model, arguments.base_url, arguments.served_name)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokenizer is None:
            from tests.runs.conftest import save_tokenizer

            save_tokenizer(Path(folder))
        renderer = load_renderer(arguments.tokenizer or folder)
    call = '<tool_call>\n{"name": "look", "arguments": {"query": "the page number"}}\n</tool_call>'
    ids = [*renderer.encode(call), renderer.close_id]
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Value("i", 0)
    server = spawn.Process(target=serve, args=(ids, port), daemon=True)
    server.start()
    while port.value == 0:
        time.sleep(0.05)
    base_url = f"http://127.0.0.1:{port.value}/v1"
    rows = {}
    try:
        asyncio.run(measure(renderer, base_url, concurrent=8, episodes=40, turns=arguments.turns))  # warm up
        for concurrent in arguments.concurrency:
            episodes = max(100, 4 * concurrent)
            rows[concurrent] = asyncio.run(
                measure(renderer, base_url, concurrent=concurrent, episodes=episodes, turns=arguments.turns)
            )
            shown = "  ".join(f"{name} {value:9.2f}" for name, value in rows[concurrent].items())
            print(f"{concurrent:5} at once: {shown}")
    finally:
        server.terminate()
        server.join()
    print(json.dumps({"bench": "rollout", "sampled_tokens": len(ids), "rows": rows}))


if __name__ == "__main__":
    main()
