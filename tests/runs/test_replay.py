"""A training run that is recorded on a real site and played again with the site down sees the same tokens."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import ROOT, TEMPLATE, Workplace

START = "http://127.0.0.1:{port}/p/1"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def site(port: int) -> Iterator[None]:
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "fakes" / "small_site.py"), str(port)])
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(START.format(port=port), timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the site did not start"
                time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def save_browsing_model(path: Path, *, seed: int, port: int) -> Path:
    """A random model that browses without having learnt to: whole calls are tokens of its vocabulary, and they and the
    end of a turn are likelier than letters."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    urls = [START.format(port=port), *(f"http://127.0.0.1:{port}/p/{i}" for i in (5, 7, 8, 9, 99)), "1", "2", "3", "4"]
    calls = [f'{{"name": "browse", "arguments": {{"url": "{url}"}}}}' for url in urls]
    calls += [
        '{"name": "find", "arguments": {"text": "Answer"}}',
        '{"name": "submit_answer", "arguments": {"answer": "1"}}',
    ]
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    raw.add_tokens([AddedToken(f"<tool_call>{call}</tool_call>", normalized=False) for call in calls])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), initializer_range=0.1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # one direction that every hidden state has, and what it makes likelier
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[-len(calls) :, 0] = 0.35
        model.lm_head.weight[config.eos_token_id, 0] = 0.7
    model.save_pretrained(path)
    return path


def workplace_on(path: Path, port: int, engine: str) -> Workplace:
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": f"Task {i}"}], "metadata": {"answer": "1"}}
        for i in range(8)
    ]
    (path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = save_browsing_model(path / "student", seed=1, port=port)
    teacher = save_browsing_model(path / "teacher", seed=2, port=port)
    (path / "run.toml").write_text(f"""
env = "medbrowse"
steps = 3
student.model = "{student}"
teacher.model = "{teacher}"
tasks.train = "tasks.jsonl"
rollout.batch_size = 8
rollout.group_size = 4
rollout.max_turns = 6
rollout.max_turn_tokens = 48
rollout.termination_policy = "max_turns"
optim.lr = 1e-3

[env_args.browse]
mode = "record"
store = "pages"
engine = "{engine}"
tools = []
robots = false
ports = [{port}]
open_addresses = ["127.0.0.1:{port}"]
timeout_s = 12.0
page_tokens = 600
requests_per_minute = {{"127.0.0.1" = 6000}}
""")
    return Workplace(path)


def episodes(workplace: Workplace, run_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in (1, 2, 3):
        found += workplace.lines(run_id, f"episodes/step_{step:06d}.jsonl")
    return found


def what_was_seen(episode: dict[str, Any]) -> dict[str, Any]:
    """All of an episode that does not say how long it took and how much was stored by then."""
    turns = [
        {key: value for key, value in turn.items() if key not in ("sample_s", "env_s", "tool_results")}
        | {"results": [{k: v for k, v in result.items() if k != "duration_s"} for result in turn["tool_results"]]}
        for turn in episode["turns"]
    ]
    kept = ("id", "stop_reason", "error", "seed", "task")
    ids = [(trace["token_ids"], trace["loss_mask"], trace["segments"]) for trace in episode["traces"]]
    return {key: episode[key] for key in kept} | {"turns": turns, "ids": ids}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["http", pytest.param("browser", marks=pytest.mark.browser)])
def test_a_recorded_run_replays_with_the_site_down(tmp_path: Path, engine: str) -> None:
    port = free_port()
    workplace = workplace_on(tmp_path, port, engine)
    with site(port):
        workplace.run("--run-id", "one", check=True)
    written = {path: path.read_bytes() for path in (tmp_path / "pages").rglob("*") if path.is_file()}
    workplace.run("--run-id", "two", "--env_args.browse.mode", "replay", check=True)
    recorded, replayed = episodes(workplace, "one"), episodes(workplace, "two")
    assert list(map(what_was_seen, replayed)) == list(map(what_was_seen, recorded))
    assert {path: path.read_bytes() for path in (tmp_path / "pages").rglob("*") if path.is_file()} == written

    # It was a run in which something was read, followed, redirected, refused and too late.
    results = [result for episode in recorded for turn in episode["turns"] for result in turn["tool_results"]]
    kinds = Counter(result["error"]["kind"] if result["error"] else "ok" for result in results)
    assert kinds["ok"] > 30
    assert {"timeout", "execution", "invalid_arguments"} <= kinds.keys()
    assert any(result["metadata"].get("hops") for result in results)
    assert any(str(result["metadata"].get("seen", "")).startswith("link on") for result in results)
    manifests = {episode["metadata"]["pages"]["manifest"] for episode in replayed}
    assert len(manifests) == 1
    assert recorded[-1]["metadata"]["pages"]["mode"] == "record"

    # With a recording of nothing the same run goes otherwise: the pages did matter.
    (tmp_path / "none.jsonl").write_text("")
    nothing = ("--env_args.browse.mode", "replay", "--env_args.browse.store", "none.jsonl")
    workplace.run("--run-id", "three", *nothing, check=True)
    assert [e["traces"] for e in episodes(workplace, "three")] != [e["traces"] for e in recorded]
