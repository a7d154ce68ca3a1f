"""An episode as ATIF: what the package reads back is what the episode says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from atif import Trajectory

from agent_loop.view.__main__ import main
from tests.viewer.conftest import HOSTILE, ROOT, hostile, line, marks


def exported(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], Trajectory]:
    run, out = tmp_path / "run.jsonl", tmp_path / "one.atif.json"
    run.write_bytes(line(4, change))
    assert main([str(run), "--export", str(out), "--cache", str(tmp_path)]) == 0
    return json.loads(run.read_bytes()), Trajectory.model_validate_json(out.read_bytes())


def test_ids_and_numbers_are_those_of_the_trace(tmp_path: Path) -> None:
    episode, found = exported(tmp_path, marks)
    trace = episode["traces"][0]
    steps = [step for step in found.steps if step.source == "agent"]
    assert len(steps) == len(episode["turns"]) == 8
    for turn, step in zip(episode["turns"], steps, strict=True):
        part = slice(turn["start"], turn["end"])
        assert step.message == turn["message"]["content"]
        assert step.metrics is not None
        assert step.metrics.prompt_tokens == turn["start"]
        assert step.metrics.completion_token_ids == trace["token_ids"][part]
        assert step.metrics.logprobs == trace["sampling_logprobs"][part]
        assert step.metrics.extra == {
            "loss_mask": trace["loss_mask"][part],
            "teacher_logprobs": trace["teacher_logprobs"][part],
        }
    assert -9999.0 in steps[0].metrics.extra["teacher_logprobs"]  # type: ignore[union-attr,index]
    assert found.final_metrics is not None
    assert found.final_metrics.total_completion_tokens == sum(trace["loss_mask"])


def test_calls_results_and_messages(tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["task"]["messages"] = [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "an example"},
        ]
        first, second = value["turns"][:2]
        first["message"]["reasoning"] = "hm"
        first["message"]["tool_calls"][0] |= {"arguments": None, "parse_error": "no JSON", "raw": "{oops"}
        second["tool_results"][0]["call_id"] = "of no call"
        second["observation"] = [{"role": "user", "content": "go on"}]

    episode, found = exported(tmp_path, change)
    assert [(step.source, step.message) for step in found.steps[:3]] == [
        ("system", "rules"), ("user", "q"), ("agent", "an example"),
    ]  # fmt: skip
    assert [step.is_copied_context for step in found.steps[:4]] == [None, None, True, None]
    first, second, answer = found.steps[3:6]
    assert first.reasoning_content == "hm"
    assert first.tool_calls is not None
    assert first.tool_calls[0].arguments == {}
    assert first.tool_calls[0].extra == {"parse_error": "no JSON", "raw": "{oops"}
    assert first.observation is not None
    assert first.observation.results[0].source_call_id == first.tool_calls[0].tool_call_id
    assert first.observation.results[0].content == episode["turns"][0]["tool_results"][0]["content"]
    assert second.observation is not None
    assert second.observation.results[0].source_call_id is None
    assert (answer.source, answer.message) == ("user", "go on")


def test_messages_alone_have_no_metrics(tmp_path: Path) -> None:
    def without_ids(value: dict[str, Any]) -> None:
        value["traces"] = []
        for turn in value["turns"]:
            turn |= {"trace": None, "start": None, "end": None}

    _, found = exported(tmp_path, without_ids)
    assert {step.metrics for step in found.steps} == {None}
    assert found.final_metrics is not None
    assert found.final_metrics.total_completion_tokens is None


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    _, found = exported(tmp_path, hostile)
    assert found.steps[0].message == HOSTILE
    text = (tmp_path / "one.atif.json").read_text()
    assert text.isascii()
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([line(1), line(2)], "error: 2 episodes; name one with --query"),
        ([b'{"torn\n'], "error: Invalid control character"),
        (
            [line(1, lambda value: value["task"]["messages"][0].update(content="\ud800"))],
            "error: 1 validation error for Trajectory",
        ),
    ],
    ids=["two", "no episode", "no text"],
)
def test_what_cannot_be_written(lines: list[bytes], why: str, tmp_path: Path, capsys: Any) -> None:
    run, out = tmp_path / "run.jsonl", tmp_path / "one.atif.json"
    run.write_bytes(b"".join(lines))
    assert main([str(run), "--export", str(out), "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(why)
    assert not out.exists()


def test_without_atif_it_says_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    run.write_bytes(line(1))
    arguments = [str(run), "--export", str(tmp_path / "one.atif.json"), "--cache", str(tmp_path)]
    code = f"import sys; sys.modules['atif'] = None; from agent_loop.view.__main__ import main; exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install -e '.[atif]'" in done.stderr
