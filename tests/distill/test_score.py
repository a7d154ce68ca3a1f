"""`python -m distill.score`: another teacher's numbers, asked for once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import EpisodeWriter
from distill.score import main
from tests.distill.training_cases import make_episodes
from tests.fakes.fake_vllm import FakeVllm

COUNT = 12
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    writer = EpisodeWriter(tmp_path / "episodes.jsonl")
    for episode in make_episodes(COUNT, top_k=3):
        writer.append(episode)
    writer.close()
    return writer.path


def arguments(stored: Path, server: FakeVllm, out: str, *more: str) -> list[str]:
    cache = ["--cache", str(stored.parent / "cache")]
    where = ["--teacher", server.model, "--base-url", server.base_url, "--out", str(stored.parent / out)]
    return [str(stored), *where, *cache, *more]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_scores(path: Path) -> list[dict[str, Any]]:
    found = rows(path)
    for row in found:
        for trace in row["traces"]:
            trace["teacher_logprobs"] = trace["teacher_topk"] = None
    return found


def numbers(path: Path) -> list[Any]:
    return [trace["teacher_logprobs"] for row in rows(path) for trace in row["traces"]]


def test_what_was_scored_once_is_not_asked_again(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored.read_bytes()
    with FakeVllm("teacher", 64) as server:
        assert main(arguments(stored, server, "one.jsonl")) == 0
        asked = len(server.received)
        assert asked >= COUNT
        assert main(arguments(stored, server, "two.jsonl")) == 0
        assert len(server.received) == asked
        assert (stored.parent / "one.jsonl").read_bytes() == (stored.parent / "two.jsonl").read_bytes()
        log_ratio = num_tokens = 0.0
        for row in rows(stored.parent / "one.jsonl"):
            (trace,) = row["traces"]
            states = server.invented.states(trace["token_ids"])
            for i, trained in enumerate(trace["loss_mask"]):
                if trained:
                    expected = server.invented.logprob(states[i], trace["token_ids"][i])
                    assert trace["teacher_logprobs"][i] == pytest.approx(expected, abs=1e-6)
                    log_ratio += trace["sampling_logprobs"][i] - expected
                    num_tokens += 1
                else:
                    assert trace["teacher_logprobs"][i] is None
    assert stored.read_bytes() == before
    said = capsys.readouterr().out
    assert f"teacher_kl {log_ratio / num_tokens:.4f} nats a token" in said
    assert "coverage 100.0%" in said


def test_another_teacher_changes_the_numbers_and_only_them(stored: Path) -> None:
    with FakeVllm("teacher", 64) as server, FakeVllm("other", 96) as other:
        assert main(arguments(stored, server, "one.jsonl")) == 0
        assert main(arguments(stored, other, "two.jsonl")) == 0
        assert len(other.received) >= COUNT
    one, two = stored.parent / "one.jsonl", stored.parent / "two.jsonl"
    assert without_scores(one) == without_scores(two) == without_scores(stored)
    assert all(a != b for a, b in zip(numbers(one), numbers(two), strict=True))


def test_candidates_are_another_question(stored: Path) -> None:
    with FakeVllm("teacher", 64) as server:
        assert main(arguments(stored, server, "one.jsonl")) == 0
        assert main(arguments(stored, server, "two.jsonl", "--top-k", "4")) == 0
        asked = len(server.received)
        assert main(arguments(stored, server, "three.jsonl", "--top-k", "4")) == 0
        assert len(server.received) == asked
    two, three = stored.parent / "two.jsonl", stored.parent / "three.jsonl"
    assert two.read_bytes() == three.read_bytes()
    assert numbers(two) == numbers(stored.parent / "one.jsonl")
    (trace,) = rows(two)[0]["traces"]
    assert [len(row or ()) for row in trace["teacher_topk"]["token_ids"]] == [4 * m for m in trace["loss_mask"]]


def test_a_refused_episode_keeps_the_cause_and_is_asked_again(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeVllm("teacher", 64) as server:
        server.fault_after(2, "nan", only_scoring=True, times=1)
        assert main(arguments(stored, server, "one.jsonl")) == 0
        asked = len(server.received)
        assert f"{COUNT - 1} of {COUNT} episodes scored, 1 failed" in capsys.readouterr().out
        (failed,) = [row for row in rows(stored.parent / "one.jsonl") if row["error"] is not None]
        assert (failed["error"]["boundary"], failed["error"]["kind"]) == ("teacher", "not_finite")
        assert failed["traces"][0]["teacher_logprobs"] is None
        assert main(arguments(stored, server, "two.jsonl")) == 0
        assert len(server.received) == asked + 1
    assert without_scores(stored.parent / "two.jsonl") == without_scores(stored)
    assert all(row["error"] is None for row in rows(stored.parent / "two.jsonl"))


def test_after_a_kill_the_same_command_asks_for_the_rest(stored: Path) -> None:
    with FakeVllm("teacher", 64) as server:
        server.fault_after(5, "stall", only_scoring=True)
        command = [sys.executable, "-m", "distill.score", *arguments(stored, server, "one.jsonl")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 90
            while not (files := list((stored.parent / "cache" / "scores").glob("*.jsonl"))) or (
                files[0].read_bytes().count(b"\n") < 1 + 5
            ):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        assert not (stored.parent / "one.jsonl").exists()
        with files[0].open("ab") as cache:
            cache.write(b'{"key":"0123')  # as a power cut leaves it
        server.fault_after(10**9, "stall")
        asked = len(server.received)
        assert main(arguments(stored, server, "one.jsonl")) == 0
        assert len(server.received) - asked == COUNT - 5
        assert main(arguments(stored, server, "two.jsonl", "--cache", str(stored.parent / "empty"))) == 0
    assert (stored.parent / "one.jsonl").read_bytes() == (stored.parent / "two.jsonl").read_bytes()
    assert not list(stored.parent.glob(".*.part"))


def test_a_torn_line_is_named_and_nothing_is_written(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = stored.read_text()
    stored.write_text(whole[:-40])
    with FakeVllm("teacher", 64) as server:
        assert main(arguments(stored, server, "one.jsonl")) == 4
    said = capsys.readouterr().err
    assert f"{stored}:{COUNT}: torn" in said
    assert sorted(path.name for path in stored.parent.iterdir()) == ["cache", stored.name]


def test_what_is_there_is_not_written_over(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored.read_bytes()
    with FakeVllm("teacher", 64) as server:
        assert main(arguments(stored, server, stored.name)) == 2
        assert not server.received
    assert "is there already" in capsys.readouterr().err
    assert stored.read_bytes() == before


def test_a_server_that_is_not_there_ends_it(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVllm("teacher", 64) as server:
        gone = arguments(stored, server, "one.jsonl")
    monkeypatch.setattr("distill.score.RETRY_S", 0.1)
    assert main(gone) == 5
    assert not (stored.parent / "one.jsonl").exists()
