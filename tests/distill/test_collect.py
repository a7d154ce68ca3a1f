"""`python -m distill.collect`, against a real chat server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import read_episodes
from agent_loop.types import Episode
from distill.collect import MIN_FAILED_IN_A_ROW, main
from tests.fakes.fake_vllm import FakeVllm
from tests.runs.conftest import TOOLS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment with four training tasks."""
    env = tmp_path / "adding"
    env.mkdir()
    (env / "tools.py").write_text(TOOLS)
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": f"add {i}"}], "metadata": {"answer": str(2 * i)}}
        for i in range(4)
    ]
    (env / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return env


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with FakeVllm("m", 64) as running:
        yield running


@pytest.fixture
def flags(folder: Path, server: FakeVllm, tmp_path: Path) -> list[str]:
    where = ["--env", str(folder), "--model", "m", "--base-url", server.base_url, "--out", str(tmp_path / "out")]
    return [*where, "--max-concurrent", "1", "--retry-s", "0.01"]


def ids(file: Path) -> list[str]:
    return [item.id for item in read_episodes(file) if isinstance(item, Episode)]


def chats(server: FakeVllm) -> list[Mapping[str, Any]]:
    return [r.payload for r in server.received if r.path.endswith("/chat/completions")]


def test_what_is_there_is_not_played_again(flags: list[str], server: FakeVllm, tmp_path: Path) -> None:
    assert main([*flags, "--num-tasks", "3"]) == 0
    assert ids(tmp_path / "out" / "episodes.jsonl") == ["0/t0/0", "0/t1/0", "0/t2/0"]
    assert len(chats(server)) == 3
    assert main([*flags, "--num-tasks", "3"]) == 0
    assert len(chats(server)) == 3
    assert main([*flags, "--group-size", "2"]) == 0
    assert len(chats(server)) == 8
    assert sorted(ids(tmp_path / "out" / "episodes.jsonl")) == [f"0/t{i}/{k}" for i in range(4) for k in range(2)]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["episodes"] == 8


@pytest.mark.parametrize(
    ("budget", "played", "why"),
    [
        (["--max-tokens", "15"], 2, "--max-tokens 15 are spent"),  # 10 an episode: the second overruns it, none follows
        (["--max-tokens", "20"], 2, "--max-tokens 20 are spent"),
        (["--max-episodes", "3"], 3, "--max-episodes 3 are played"),
    ],
)
def test_a_budget_ends_it_cleanly(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: list[str], played: int, why: str
) -> None:
    assert main([*flags, *budget]) == 0
    said = capsys.readouterr().err
    assert f"{played} episodes played, 0 failed, {4 - played} of 4 missing" in said
    assert f"{7 * played} prompt and {3 * played} completion tokens spent; stopped: {why}" in said
    assert main(flags) == 0
    assert f"{4 - played} episodes played, 0 failed, 0 of 4 missing" in capsys.readouterr().err
    assert len(ids(tmp_path / "out" / "episodes.jsonl")) == 4


def test_a_failed_episode_is_recorded_and_played_again(
    flags: list[str], server: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault_after(1, "html", times=1)
    assert main(flags) == 0
    printed = capsys.readouterr().err
    assert "3 episodes played, 1 failed, 1 of 4 missing" in printed
    assert "failed 1x at student (protocol)" in printed
    assert ids(tmp_path / "out" / "failed.jsonl") == ["0/t1/0"]
    assert "0/t1/0" not in ids(tmp_path / "out" / "episodes.jsonl")
    assert main(flags) == 0
    assert "1 episodes played, 0 failed, 0 of 4 missing" in capsys.readouterr().err
    assert ids(tmp_path / "out" / "episodes.jsonl")[-1] == "0/t1/0"


def test_a_server_that_fails_everything_ends_it(
    flags: list[str], server: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault_after(3, "http_500")
    assert main([*flags, "--group-size", "5"]) == 5
    said = capsys.readouterr().err
    assert f"the last {MIN_FAILED_IN_A_ROW} episodes all failed, the last at student (unavailable)" in said
    assert "call again to go on" in said
    assert len(ids(tmp_path / "out" / "episodes.jsonl")) == 3
    assert len(ids(tmp_path / "out" / "failed.jsonl")) == MIN_FAILED_IN_A_ROW  # and not the 17 that were left


def test_a_folder_holds_one_kind_of_episodes(
    flags: list[str], server: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--num-tasks", "1"]) == 0
    assert main([*flags, "--temperature", "0.5"]) == 2
    assert "was collected with temperature = 1.0, this is 0.5" in capsys.readouterr().err
    (tmp_path / "out" / "collect.json").unlink()
    assert main(flags) == 2
    assert "that distill.collect did not collect" in capsys.readouterr().err
    assert len(chats(server)) == 1


def test_nobody_there(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags[flags.index("--base-url") + 1] = "http://127.0.0.1:9/v1"
    assert main(flags) == 5
    assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
