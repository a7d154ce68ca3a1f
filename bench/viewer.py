"""The trace viewer on a generated run: index, memory, opening, search, export.

    python -m bench.viewer [--episodes 10000] [--bytes 1000000000]

Files are made in a temporary folder and deleted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = (
    "trial",
    "arm",
    "ingredient",
    "approval",
    "label",
    "dose",
    "patient",
    "outcome",
    "registry",
    "company",
    "patent",
)


def episode_line(number: int, *, tokens: int, seed: int = 0, turns: int = 8, step: int = 1, task: str = "") -> bytes:
    """One line of an episode file: about a third of the tokens sampled and scored, tool text for the rest."""
    draw = random.Random(seed * 1_000_003 + number)
    task = task or f"t{number}"
    ids: list[int] = [draw.randrange(4000) for _ in range(tokens)]
    mask, student, teacher = [0] * tokens, [None] * tokens, [None] * tokens
    segments: list[list[Any]] = []
    each = tokens // (turns + 1)
    segments.append(["prompt", -1, 0, each])
    played = []
    for turn in range(turns):
        start = each * (turn + 1)
        end = start + max(1, each // 3)
        stop = tokens if turn == turns - 1 else each * (turn + 2)
        segments += [["assistant", turn, start, end], ["tool", turn, end, stop]]
        for i in range(start, end):
            mask[i] = 1
            student[i] = -draw.expovariate(2.0)  # type: ignore[call-overload]
            teacher[i] = -draw.expovariate(1.5)  # type: ignore[call-overload]
        text = " ".join(draw.choices(WORDS, k=max(4, each // 3)))
        content = " ".join(draw.choices(WORDS, k=max(4, each // 2)))
        call = {
            "id": f"call_{turn}_0",
            "name": "search",
            "arguments": {"query": text[:40]},
            "raw": "{}",
            "parse_error": None,
        }
        result = {
            "call_id": call["id"], "name": "search", "content": content, "error": None, "ends_episode": False,
            "truncated_chars": 0, "duration_s": 0.01, "metadata": {},
        }  # fmt: skip
        played.append(
            {
                "index": turn, "message": {"content": text, "reasoning": None, "tool_calls": [call], "finished": True},
                "text": text, "observation": [{"role": "tool", "content": content}], "tool_results": [result],
                "trace": 0, "start": start, "end": end, "finish_reason": "stop", "policy_version": step,
                "token_classes": [], "num_parse_errors": 0, "sample_s": 0.2, "env_s": 0.01,
            }
        )  # fmt: skip
    value = {
        "schema_version": 1, "id": f"{step}/{task}/0", "env_id": "generated", "stop_reason": "answered", "reward": None,
        "rewards": {}, "error": None, "policy_version": step, "seed": number, "timing": {"total": 1.0}, "metadata": {},
        "task": {
            "id": task, "messages": [{"role": "user", "content": f"question {number}"}], "metadata": {}, "rewards": [],
            "tools": None,
        },
        "turns": played,
        "traces": [
            {
                "token_ids": ids, "loss_mask": mask, "sampling_logprobs": student, "teacher_logprobs": teacher,
                "teacher_topk": None, "policy_versions": None, "sampling_topk": None, "segments": segments,
            }
        ],
    }  # fmt: skip
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def write_run(folder: Path, *, episodes: int, size: int) -> int:
    """A run of that many episodes and about that many bytes; a hundred lines are made and renumbered. Returns bytes."""
    (folder / "episodes").mkdir(parents=True)
    tokens = max(100, size // episodes // 20)
    made = [episode_line(i, tokens=tokens) for i in range(100)]
    mean = sum(map(len, made)) / len(made)
    made = [episode_line(i, tokens=int(tokens * size / episodes / mean)) for i in range(100)]
    total = 0
    for step in range(0, episodes, 250):
        with (folder / "episodes" / f"step_{step // 250 + 1:06d}.jsonl").open("wb") as file:
            for number in range(step, min(episodes, step + 250)):
                line = made[number % 100].replace(b'"id":"1/t', b'"id":"%d/e%d-t' % (step // 250 + 1, number), 1)
                if number == episodes // 2:
                    line = line.replace(b"trial", b"needleword", 1)
                total += file.write(line)
    return total


def child(code: str, *arguments: str) -> dict[str, Any]:
    """Runs code in a process of its own, for its memory; it prints one JSON object."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from agent_loop.view.index import Index
from agent_loop.view.search import find
run, cache = Path(sys.argv[1]), Path(sys.argv[2])
start = time.perf_counter(); index = Index([run], cache); ready = time.perf_counter() - start
found = {"index_s": ready, "rows": len(index.rows())}
for name, query in (("absent", "tool:zebrafish"), ("rare", "needleword"), ("common", "tool:registry")):
    start = time.perf_counter(); hits = find(index, query)
    found[f"search_{name}_s"] = time.perf_counter() - start
    found[f"search_{name}"] = [len(hits.rows), hits.searched]
start = time.perf_counter(); find(index, "kl>0.1 is:scored", sort="-kl")
found["filter_sort_s"] = time.perf_counter() - start
found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(found))
"""

OPEN = """
import json, resource, sys, time
from pathlib import Path
import msgspec
from agent_loop.view.detail import episode_page
from agent_loop.view.export import write_html
from agent_loop.view.index import Index
run, cache = Path(sys.argv[1]), Path(sys.argv[2])
index = Index([run], cache)
found = {}
for row in index.rows():
    times = []
    for _ in range(5):
        start = time.perf_counter(); body = msgspec.json.encode(episode_page(index, row, None))
        times.append(time.perf_counter() - start)
    html = write_html(index, [run], [None], [row])
    sizes = {"answer_mb": len(body) / 1e6, "html_mb": len(html.encode()) / 1e6}
    found[str(row.tokens)] = {"answer_ms": 1000 * sorted(times)[2], **sizes}
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="viewer-") as name:
        folder = Path(name)
        start = time.perf_counter()
        total = write_run(folder / "big", episodes=arguments.episodes, size=arguments.bytes)
        print(f"made {total / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        cold = child(MEASURE, str(folder / "big"), str(folder / "cache"))
        warm = child(MEASURE, str(folder / "big"), str(folder / "cache"))
        single = folder / "single"
        single.mkdir()
        for tokens in (32_768, 100_000):
            (single / f"{tokens}.jsonl").write_bytes(episode_line(0, tokens=tokens, turns=40))
        opened = child(OPEN, str(single), str(folder / "cache"))
    report = {"gb": total / 1e9, "cold": cold, "warm": warm, "open": opened}
    report["own_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for part in ("cold", "warm"):
        print(part, json.dumps(report[part], indent=1))
    print("open", json.dumps(opened, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
