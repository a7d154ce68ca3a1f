"""What scoring costs by each way to ask (agent_loop/scorers.py), on a real vLLM server and in replies alone.

    python -m bench.scoring --model FOLDER [--tokens 1024] [--sequences 8] [--top-k 0 8 20]    starts vLLM here
    python -m bench.scoring --base-url http://HOST:8000/v1 --served-name teacher               one that runs
    python -m bench.scoring --replies                                                          no server at all

Sequences are random ids with an eighth of the tokens trained, in four runs, as in an episode of four turns. Bytes and
CPU are a token of the whole sequence. The server's CPU is split: `api` is its HTTP process, `engine` all others.
`stall` is the longest time for which the client's event loop stood still. `--replies` reads replies of 16,384 tokens
that are made here, so `fast`, which only a GPU answers, is in it too: bytes and client time, nothing of a server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agent_loop.scorers import FAST_FIELD, FastScorer, PlainScorer, PluginScorer, Scorer
from agent_loop.scoring import ScoringError
from agent_loop.transport import HttpTransport, read_reply

KEY = "bench"
START_S = 600.0
VOCAB = 500
"""Ids below it: every model has them, and none of them is special in the models used here."""


@contextmanager
def vllm_server(model: Path, *options: str, plugin: bool = True) -> Iterator[tuple[str, int]]:
    """A server on this machine, named `teacher`: its address and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--served-model-name", "teacher", "--enable-scale-out", "--api-key", KEY),
        *("--generation-config", "vllm", "--enforce-eager", "--disable-uvicorn-access-log", *options),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        **os.environ,
        "VLLM_PLUGINS": "distill_score" if plugin else "",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise SystemExit(f"vLLM did not start:\n{''.join(log.readlines()[-30:])}") from None
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.terminate()
            process.wait(60)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU of a process, and of all its descendants together."""
    times: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        times[int(folder.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    family = {pid}
    while more := {child for child, (parent, _) in times.items() if parent in family} - family:
        family |= more
    return times[pid][1], sum(times[child][1] for child in family - {pid})


class Counting(HttpTransport):
    """Counts the bytes of bodies."""

    sent = received = 0

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        self.sent += len(json.dumps(payload, separators=(",", ":")))
        return await super().post_json(path, payload, timeout_s=timeout_s, key=key)

    async def _bounded(self, response: Any, url: str) -> bytes:
        content = await super()._bounded(response, url)
        self.received += len(content)
        return content


class Canned:
    """A transport whose reply is there already; it is read as one that comes over HTTP."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        return read_reply(path, 200, self._body)

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Nothing is open."""


def trained_rows(length: int) -> list[int]:
    """An eighth of the tokens, in four runs, the last of them at the end."""
    run = length // 32
    return [length * turn // 4 - run + i for turn in range(1, 5) for i in range(run)]


class Stall:
    """`with Stall() as stall: ...` `stall.longest_s`: the longest gap between two turns of the event loop."""

    longest_s = 0.0

    async def __aenter__(self) -> Stall:
        self._task = asyncio.ensure_future(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last - 0.001)
            last = now


async def measure(
    scorer: Scorer, top_k: int, base_url: str, pid: int | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    rng = random.Random(0)
    rows = trained_rows(arguments.tokens)
    sequences = [rng.choices(range(10, VOCAB), k=arguments.tokens) for _ in range(arguments.sequences)]
    transport = Counting(base_url, api_key=os.environ.get(arguments.api_key_env, KEY))

    async def score(ids: Sequence[int]) -> None:
        await scorer.score(transport, arguments.served_name, ids, rows, top_k=top_k, timeout_s=3600.0)

    try:
        await score(sequences[0])  # the first request of a kind warms the server up
        transport.sent = transport.received = 0
        server = cpu_seconds(pid) if pid is not None else (0.0, 0.0)
        began = time.perf_counter()
        async with Stall() as stall:
            await asyncio.gather(*map(score, sequences))
        wall_s = time.perf_counter() - began
        after = cpu_seconds(pid) if pid is not None else (0.0, 0.0)
    finally:
        await transport.aclose()
    tokens = arguments.tokens * arguments.sequences
    api_s, engine_s = (now - then for now, then in zip(after, server, strict=True))
    return {
        "K": top_k,
        "scorer": scorer.name,
        "tokens/s": round(tokens / wall_s),
        "bytes up": round(transport.sent / tokens, 1),
        "bytes down": round(transport.received / tokens, 1),
        "api us": round(1e6 * api_s / tokens, 1) if pid is not None else None,
        "engine us": round(1e6 * engine_s / tokens, 1) if pid is not None else None,
        "stall ms": round(1e3 * stall.longest_s, 1),
    }


async def measure_server(arguments: argparse.Namespace, base_url: str, pid: int | None) -> list[dict[str, Any]]:
    results = []
    for top_k in arguments.top_k:
        for scorer in (PlainScorer(), PlainScorer("generate"), PluginScorer(), FastScorer()):
            try:
                results.append(await measure(scorer, top_k, base_url, pid, arguments))
            except ScoringError as error:
                if error.kind == "unavailable":
                    raise
                print(f"K = {top_k}, {scorer.name}: {error}", file=sys.stderr)
    return results


def reply_of(scorer: Scorer, ids: Sequence[int], rows: Sequence[int], top_k: int) -> bytes:
    """A reply as the server would write it, with random numbers."""
    rng = random.Random(1)
    table = np.random.default_rng(0).uniform(-20, -1e-3, (len(ids), 1 + top_k)).astype(np.float32)
    others = [rng.sample(range(10, 50_000), top_k) for _ in range(len(ids))]
    if isinstance(scorer, FastScorer):
        buffer = io.BytesIO()
        np.save(buffer, table[rows[0] :])
        return json.dumps({FAST_FIELD: base64.b64encode(buffer.getvalue()).decode()}).encode()
    if isinstance(scorer, PluginScorer):
        shown = np.asarray([[ids[row], *others[row]] for row in rows], "<i4")
        arrays = {"ids": shown, "logprobs": table[list(rows)]}
        return json.dumps({name: base64.b64encode(a.tobytes()).decode() for name, a in arrays.items()}).encode()
    entries: list[Any] = [None]
    for position in range(1, len(ids)):
        shown_ids = [ids[position], *others[position]]
        values = table[position].tolist()
        entries.append(
            {
                str(i): {"logprob": value, "rank": rank, "decoded_token": None}
                for rank, (i, value) in enumerate(zip(shown_ids, values, strict=True))
            }
        )
    return json.dumps({"prompt_logprobs": entries}, separators=(",", ":")).encode()


async def measure_replies(top_ks: Sequence[int], length: int = 16_384, repeats: int = 3) -> list[dict[str, Any]]:
    ids = random.Random(0).choices(range(10, VOCAB), k=length)
    rows = trained_rows(length)
    results = []
    for top_k in top_ks:
        candidates = [list(range(1000, 1000 + top_k))] * len(rows) if top_k else None
        for scorer in (PlainScorer("generate"), PluginScorer(), FastScorer()):
            body = reply_of(scorer, ids, rows, top_k)
            given = candidates if isinstance(scorer, FastScorer) else None
            times, parses = [], []
            for _ in range(repeats):
                began = time.perf_counter()
                json.loads(body)
                parses.append(time.perf_counter() - began)
                began = time.perf_counter()
                await scorer.score(Canned(body), "m", ids, rows, top_k=top_k, timeout_s=1.0, candidates=given)
                times.append(time.perf_counter() - began)
            results.append(
                {
                    "K": top_k,
                    "scorer": scorer.name.split()[0],
                    "MB": round(len(body) / 1e6, 2),
                    "bytes a token": round(len(body) / length, 1),
                    "json.loads ms": round(1e3 * min(parses), 1),
                    "all of it ms": round(1e3 * min(times), 1),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder; a vLLM server is started for it")
    parser.add_argument("--base-url", help="of a server that runs, with its /v1")
    parser.add_argument("--served-name", default="teacher")
    parser.add_argument("--api-key-env", default="BENCH_API_KEY", help="variable with the key of --base-url's server")
    parser.add_argument("--server-pid", type=int, help="of --base-url's server on this machine, for its CPU")
    parser.add_argument("--replies", action="store_true", help="only the replies, no server")
    parser.add_argument("--tokens", type=int, default=1024, help="a sequence")
    parser.add_argument("--sequences", type=int, default=8, help="all at once")
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 8, 20])
    arguments = parser.parse_args()
    if arguments.replies:
        results = asyncio.run(measure_replies(arguments.top_k))
    elif arguments.base_url:
        results = asyncio.run(measure_server(arguments, arguments.base_url, arguments.server_pid))
    elif arguments.model:
        limits = ("--max-model-len", str(arguments.tokens + 1), "--max-logprobs", str(max(20, *arguments.top_k)))
        with vllm_server(arguments.model, *limits) as (base_url, pid):
            results = asyncio.run(measure_server(arguments, base_url, pid))
    else:
        parser.error("one of --model, --base-url and --replies is needed")
    print("| " + " | ".join(results[0]) + " |")
    print("|" + "---|" * len(results[0]))
    for result in results:
        print("| " + " | ".join("-" if value is None else str(value) for value in result.values()) + " |")
    print(json.dumps({"bench": "scoring", "model": str(arguments.model or arguments.base_url), "results": results}))


if __name__ == "__main__":
    main()
