"""`python -m agent_loop.rollout`, against real servers on loopback."""

from __future__ import annotations

import json
import math
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import read_episodes
from agent_loop.evaluate import main
from agent_loop.renderer import load_renderer
from agent_loop.summary import pass_at, summarise, table
from agent_loop.types import Episode, EpisodeError
from envs.types import StopReason, Task
from tests.fakes.fake_vllm import FakeVllm
from tests.runs.conftest import TOOLS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment with evaluation tasks."""
    env = tmp_path / "adding"
    env.mkdir()
    (env / "tools.py").write_text(TOOLS)
    rows = [
        {
            "id": f"t{i}",
            "messages": [{"role": "user", "content": f"add {i} and {i}"}],
            "metadata": {"answer": str(2 * i)},
        }
        for i in range(4)
    ]
    (env / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return env


@pytest.fixture
def server(tiny_tokenizer: Path) -> Iterator[FakeVllm]:
    with FakeVllm("m", load_renderer(tiny_tokenizer).vocab_size, max_model_len=300) as running:
        yield running


@pytest.fixture
def flags(folder: Path, server: FakeVllm, tiny_tokenizer: Path) -> list[str]:
    where = ["--env", str(folder), "--model", "m", "--base-url", server.base_url, "--tokenizer", str(tiny_tokenizer)]
    return [*where, "--max-turn-tokens", "8", "--max-turns", "3"]


def test_a_table_and_the_files(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--samples", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["episodes"], summary["failed"]) == (12, 0)
    assert sorted(summary["pass_at"]) == ["pass@1", "pass@2", "pass@3"]
    assert sum(summary["stop_reasons"].values()) == pytest.approx(1.0)
    assert (summary["teacher_kl"], summary["unscored"]) == (None, None)
    episodes = list(read_episodes(out / "episodes.jsonl"))
    assert {e.id for e in episodes if isinstance(e, Episode)} == {f"0/t{i}/{k}" for i in range(4) for k in range(3)}
    assert re.search(r"^episodes +12 \(0 failed\)$", printed.out, re.MULTILINE)
    assert "12/12 episodes" in printed.err


def test_training_tasks_where_they_are_asked_for(flags: list[str], folder: Path, tmp_path: Path) -> None:
    rows = [
        json.loads(line) | {"id": f"train{i}"}
        for i, line in enumerate((folder / "eval.jsonl").read_text().splitlines())
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*flags, "--split", "train", "--num-tasks", "2", "--out", str(tmp_path)]) == 0
    episodes = list(read_episodes(tmp_path / "episodes.jsonl"))
    assert {e.task.id for e in episodes if isinstance(e, Episode)} == {"train0", "train1"}


def test_the_same_seed_plays_the_same(flags: list[str], tmp_path: Path) -> None:
    played = []
    for run, seed in enumerate(("1", "1", "2")):
        assert main([*flags, "--seed", seed, "--out", str(tmp_path / str(run))]) == 0
        items = read_episodes(tmp_path / str(run) / "episodes.jsonl")
        played.append({e.id: [t.token_ids for t in e.traces] for e in items if isinstance(e, Episode)})
    assert played[0] == played[1] != played[2]


def test_the_kl_to_a_teacher_is_that_of_its_model(
    flags: list[str], server: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeVllm("t", server.invented.vocab_size) as teacher:
        teacher.invented._table = [v - 0.25 for v in teacher.invented._table]  # a quarter of a nat worse everywhere
        out = tmp_path / "out"
        asked = ["--teacher-base-url", teacher.base_url, "--teacher-model", "t", "--json", "--out", str(out)]
        assert main([*flags, *asked]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["teacher_kl"] == pytest.approx(0.25, abs=1e-6)
    assert summary["unscored"] == 0
    for episode in read_episodes(out / "episodes.jsonl"):
        assert isinstance(episode, Episode)
        for trace in episode.traces:
            assert trace.teacher_logprobs is not None
            assert [value is not None for value in trace.teacher_logprobs] == trace.loss_mask


@pytest.mark.parametrize(("good", "code", "unscored"), [(2, 0, 2), (0, 5, 4)])
def test_a_teacher_that_fails_costs_its_scores_only(
    flags: list[str], server: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    good: int, code: int, unscored: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with FakeVllm("m", server.invented.vocab_size) as teacher:
        teacher.fault_after(good, "nan", only_scoring=True)
        assert main([*flags, "--teacher-base-url", teacher.base_url, "--out", str(out)]) == code
    printed = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["unscored"], summary["failed"]) == (unscored, 0)
    assert (summary["teacher_kl"] is None) == (good == 0)
    assert f"({unscored} episodes without a score)" in printed.out
    assert f"failed {unscored}x at teacher (not_finite): the score of token" in printed.err
    assert len(list(read_episodes(out / "episodes.jsonl"))) == 4


def test_messages_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 0, "b": 0}'}}
    with FakeVllm("m", 64, chat_replies=[{"tool_calls": [call]}, {"content": "It is 0."}]) as server:
        where = ["--env", str(folder), "--model", "m", "--base-url", server.base_url]
        assert main([*where, "--chat", "--num-tasks", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pass_at"] == {"pass@1": 1.0}
    assert (summary["turns"], summary["tool_calls"], summary["sampled_tokens"]) == (2.0, 1.0, None)
    assert summary["tool_use"] == {"add": 1.0}


def test_an_environment_without_a_grader(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import envs
    from envs.tool_env import ToolEnv

    class Bare(ToolEnv):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> list[Task]:
            return [Task(id=f"b{i}", messages=({"role": "user", "content": "hi"},)) for i in range(3)]

    envs.register("test-evaluate-bare", Bare)
    flags[1] = "test-evaluate-bare"
    assert main([*flags, "--num-tasks", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert "not graded: environment 'test-evaluate-bare' has no grader" in printed.err
    summary = json.loads(printed.out)
    assert (summary["episodes"], summary["pass_at"]) == (2, {})


# What goes wrong


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("chat", [False, True])
def test_a_dead_server(flags: list[str], capsys: pytest.CaptureFixture[str], chat: bool) -> None:
    flags[5] = f"http://127.0.0.1:{free_port()}/v1"
    assert main(flags + ["--chat"] * chat) == 5
    assert "cannot be reached" in capsys.readouterr().err


def test_a_server_with_another_model(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags[3] = "other"
    assert main([*flags, "--out", str(tmp_path / "out")]) == 5
    assert "does not serve 'other'; it serves m" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_serves_something_else(
    flags: list[str], server: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--teacher-base-url", server.base_url, "--teacher-model", "t"]) == 5
    assert "does not serve 't'; it serves m" in capsys.readouterr().err
    assert [r.path for r in server.received] == ["/v1/models"] * 2  # found out before anything is played


def test_every_episode_failed(flags: list[str], server: FakeVllm, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault_after(0, "wrong_ids")
    assert main(flags) == 5
    assert "failed 4x at student (protocol): token 0 has id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--tasks", "{tmp}/none.jsonl"], 4, "none.jsonl"),
        (["--tasks", "{tmp}/empty.jsonl"], 4, "empty.jsonl"),
        (["--tasks", "{tmp}/bad.jsonl"], 4, "bad.jsonl:1"),
        (["--tokenizer", "{tmp}"], 2, "no tokenizer"),
        (["--env", "medbrows"], 2, "Did you mean 'medbrowse'"),
        (["--env-args", "colour=3"], 2, "colour"),
        (["--env", "{tmp}/untasked"], 2, "give --tasks FILE"),
    ],
)
def test_bad_input_is_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    (tmp_path / "untasked").mkdir()
    (tmp_path / "untasked" / "tools.py").write_text(TOOLS)
    assert main([*flags, *(text.format(tmp=tmp_path) for text in extra)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--samples", "0"], "must be at least 1"),
        (["--max-concurrent", "-1"], "must be at least 1"),
        (["--max-turns", "0"], "Limits.max_turns must be at least 1"),
        (["--env-args", "colour"], "'colour' is not KEY=VALUE"),
        (["--api-key-env", "NO_SUCH_VARIABLE_HERE"], "no variable NO_SUCH_VARIABLE_HERE"),
        (["--chat", "--teacher-base-url", "http://127.0.0.1:1/v1"], "needs token ids"),
        (["--temperature", "0.7", "--teacher-base-url", "http://127.0.0.1:1/v1"], "temperature 1"),
    ],
)
def test_flags_that_make_no_sense(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--env", "medbrowse", "--model", "m", "--base-url", "http://127.0.0.1:1/v1", *extra])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_two_evaluations_are_not_mixed(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out)]) == 0
    before = (out / "episodes.jsonl").read_bytes()
    assert main([*flags, "--out", str(out), "--seed", "1"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (out / "episodes.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert main([*flags, "--out", str(tmp_path / "out")]) == 7
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "agent_loop.rollout", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.monotonic() - began)
    assert "--teacher-base-url" in done.stdout
    assert min(times) < 2.0  # 0.37 s on an idle core; the bound allows for a busy one


# Numbers


def graded(task: str, reward: float | None, *, failed: bool = False) -> Episode:
    return Episode(
        id=f"0/{task}/{random.random()}",
        env_id="e",
        task=Task(id=task, messages=({"role": "user", "content": ""},)),
        turns=[],
        traces=[],
        stop_reason=StopReason.ERROR if failed else StopReason.LAST_TOOL,
        reward=reward,
        error=EpisodeError(boundary="env", kind="k", message="m") if failed else None,
    )


def test_pass_at_k_is_the_chance_of_a_draw_without_replacement() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]
    found = pass_at([graded("a", reward) for reward in rewards])
    assert sorted(found) == ["pass@1", "pass@2", "pass@4", "pass@5"]
    rng = random.Random(0)
    for name, value in found.items():
        k = int(name.removeprefix("pass@"))
        drawn = sum(max(rng.sample(rewards, k)) for _ in range(20_000)) / 20_000
        assert value == pytest.approx(drawn, abs=0.015)
    assert found["pass@1"] == pytest.approx(0.4)


def test_failures_are_failures_and_what_is_not_graded_is_left_out() -> None:
    episodes = [graded("a", 1.0), graded("a", None, failed=True), graded("b", 0.5), graded("b", 1.0), graded("c", None)]
    assert pass_at(episodes)["pass@1"] == pytest.approx((0.5 + 0.5) / 2)
    assert pass_at([graded("a", None), graded("b", None, failed=True)]) == {}


def test_success_by_type_where_there_is_an_answer_and_beside_what_takes_no_work() -> None:
    def asked(name: str, reward: float | None, *, kind: str, is_na: bool, constant: float) -> Episode:
        episode = graded(name, reward)
        hops = 2 if kind == "date" else 1
        metadata = {"question_type": kind, "hops": hops, "is_na": is_na, "baselines": {"constant": constant}}
        return replace(episode, task=replace(episode.task, metadata=metadata))

    summary = summarise(
        [
            asked("a", 1.0, kind="date", is_na=True, constant=1.0),
            asked("b", 0.0, kind="date", is_na=False, constant=0.0),
            asked("b", 0.0, kind="date", is_na=False, constant=0.0),
            asked("c", 1.0, kind="name", is_na=False, constant=0.0),
        ],
        model="m",
        env="e",
    )
    assert list(summary.by_type) == ["name", "date"]  # by hops
    assert summary.by_type == {
        "name": {"graded": 1, "hops": 1, "success": 1.0, "real": 1.0, "constant": 0.0},
        "date": {"graded": 3, "hops": 2, "success": 1 / 3, "real": 0.0, "constant": 0.5},
    }
    assert summary.real_success == pytest.approx(1 / 3)
    assert summary.baselines == {"constant": pytest.approx(1 / 3)}
    shown = table(summary)
    assert re.search(r"^  2: date +33.3% of 3 \(real 0.0%, constant 50.0%\)$", shown, re.MULTILINE)
    assert "without any work: constant" in shown
    odd = [asked("a", 1.0, kind="date", is_na=True, constant=0.0), graded("b", 0.0)]
    odd[0].task.metadata.update(baselines=["constant"], hops="two")  # a task file of somebody's own
    assert summarise(odd, model="m", env="e").baselines == {}
    plain = summarise([graded("a", 1.0)], model="m", env="e")
    assert (plain.by_type, plain.real_success, plain.baselines) == ({}, None, {})


def test_a_summary_of_nothing_but_failures() -> None:
    summary = summarise([graded("a", None, failed=True)], model="m", env="e")
    assert (summary.failed, summary.turns, summary.sampled_tokens) == (1, None, None)
    assert math.isclose(summary.stop_reasons["error"], 1.0)
    assert "stopped: error   100.0%" in table(summary)


def test_numbers_of_the_summary_can_be_read_by_anyone() -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    from dataclasses import asdict

    text = json.dumps(asdict(summarise([graded("a", 1.0)], model="m", env="e", teacher=True)))
    assert json.loads(text, parse_constant=refuse)["unscored"] == 0
