"""The judge over a real server on loopback, on episodes as they are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import EpisodeWriter
from agent_loop.judge import answer_of, main, read_verdict, report
from agent_loop.types import Episode, Turn
from envs.types import AssistantMessage, StopReason, Task
from tests.fakes.fake_vllm import FakeVllm
from tools.types import ToolCall, ToolResult


def episode(name: str, answer: str | None, *, expected: Any = "Borix AG", reward: float | None = 1.0) -> Episode:
    call = ToolCall(id="call_0_0", name="submit_answer", arguments={"answer": answer}, raw="")
    result = ToolResult(call_id="call_0_0", name="submit_answer", content="submitted", ends_episode=True)
    message = AssistantMessage(content="", tool_calls=(call,)) if answer is not None else AssistantMessage(content="")
    return Episode(
        id=f"0/{name}/0",
        env_id="e",
        task=Task(id=name, messages=({"role": "user", "content": "Who makes it?"},), metadata={"answer": expected}),
        turns=[Turn(index=0, text="", message=message, tool_results=(result,) if answer is not None else ())],
        traces=[],
        stop_reason=StopReason.ANSWERED,
        reward=reward,
    )


def stored(folder: Path, *episodes: Episode) -> Path:
    writer = EpisodeWriter(folder / "episodes.jsonl")
    for one in episodes:
        writer.append(one)
    writer.close()
    return folder


def test_verdicts_are_written_beside_the_graders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored(
        tmp_path,
        episode("a", "Borix Aktiengesellschaft", reward=0.0),
        episode("b", None, reward=0.0),
        episode("c", "x", expected=None, reward=None),
    )
    replies = [{"content": 'They agree. {"reason": "the same company", "correct": true}'}]
    with FakeVllm("judge", 64, chat_replies=replies) as server:
        assert main([str(folder), "--model", "judge", "--base-url", server.base_url, "--max-concurrent", "1"]) == 0
    found = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert [(v["correct"], v["reason"]) for v in found] == [(True, "the same company"), (False, "no answer")]
    assert (found[0]["answer"], found[0]["expected"]) == ("Borix Aktiengesellschaft", ["Borix AG"])
    said = capsys.readouterr().out
    assert "correct                   50.0%" in said
    assert "only_the_judge_accepts    1" in said


def test_an_api_that_refuses_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored(tmp_path, episode("a", "x"))
    with FakeVllm("judge", 64) as server:
        assert main([str(folder), "--model", "other", "--base-url", server.base_url]) == 5
    assert "error: no verdict: " in capsys.readouterr().err
    assert json.loads((folder / "judged.jsonl").read_text())["correct"] is None


def test_nothing_to_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    assert main([str(tmp_path / "none.jsonl"), *flags]) == 2
    (tmp_path / "episodes.jsonl").write_text("no json\n")
    assert main([str(tmp_path), *flags]) == 4
    said = capsys.readouterr().err
    assert "there is no file" in said
    assert "episodes.jsonl:1: skipped" in said
    with pytest.raises(SystemExit):
        main([str(tmp_path), *flags, "--api-key-env", "NO_SUCH_KEY_HERE"])


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ('{"correct": true}', True),
        ('{"correct": true} No: {"reason": "x", "correct": false}', False),
        ('{"correct": "true"}', None),
        ("correct", None),
        ("{broken", None),
        ("", None),
    ],
)
def test_what_is_a_verdict(text: str, correct: bool | None) -> None:
    assert read_verdict(text)[0] is correct


def test_the_last_words_are_an_answer_too() -> None:
    plain = episode("a", None)
    plain.turns[-1] = Turn(index=0, text="", message=AssistantMessage(content=" Borix AG "))
    assert answer_of(plain) == "Borix AG"
    plain.turns[-1] = Turn(index=0, text="", message=AssistantMessage(content="Borix", finished=False))
    assert answer_of(plain) is None
    assert report([])["correct"] is None
