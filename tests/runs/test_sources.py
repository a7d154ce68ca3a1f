"""Two environments, two teachers, one student: real processes, once interrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import read_episodes
from agent_loop.types import Episode
from tests.runs.conftest import TOOLS, Workplace, make_workplace

REWARDS = '''"""A grader that anybody passes who says something."""

from envs.rewards import RewardArgs, reward


@reward
def success(args: RewardArgs, messages: list) -> float:
    return 1.0 if args.metadata["answer"] == "9" else 0.0
'''
SOURCES = """
[sources.adding]
share = 2

[sources.taking]
env = "{folder}/taking"
teacher = "tutor"

[teachers.tutor]
system_prompt = "the number {{answer}} add {{not this}}"
prompt_fields = ["answer"]
examples = "{folder}/examples.jsonl"
"""


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def two(tmp_path: Path, models: Path) -> Workplace:
    """A folder environment of the run, and another one whose teacher is the student itself, told the answer."""
    place = make_workplace(
        tmp_path, models, **{"rollout.max_concurrent": "1", "loss.source_balance": "1.0", "eval.at_end": "true"}
    )
    taking = tmp_path / "taking"
    taking.mkdir()
    (taking / "tools.py").write_text(TOOLS.replace("def add", "def take").replace("a + b", "a - b"))
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": f"take {i}"}], "metadata": {"answer": str(i)}}
        for i in range(7)
    ]
    write_jsonl(taking / "train.jsonl", rows)
    for folder, answers in ((tmp_path / "adding", "99"), (taking, "94")):
        (folder / "rewards.py").write_text(REWARDS)
        message = [{"role": "user", "content": "the numbers"}]
        held_out = [
            {"id": f"e{i}", "messages": message, "metadata": {"answer": a}, "rewards": ["success"]}
            for i, a in enumerate(answers)
        ]
        write_jsonl(folder / "eval.jsonl", held_out)
    call = {"id": "c1", "type": "function", "function": {"name": "take", "arguments": {"a": 4, "b": 1}}}
    example = [
        {"role": "user", "content": "take 1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "the number 3"},
    ]
    write_jsonl(tmp_path / "examples.jsonl", [{"messages": example}])
    with (tmp_path / "run.toml").open("a") as file:
        file.write(SOURCES.format(folder=tmp_path))
    return place


def episodes_of(place: Workplace, run_id: str, step: int) -> list[Episode]:
    found = list(read_episodes(place.path / "runs" / run_id / "episodes" / f"step_{step:06d}.jsonl"))
    assert all(isinstance(episode, Episode) for episode in found)
    return [episode for episode in found if isinstance(episode, Episode)]


@pytest.mark.slow
def test_two_sources_train_together_and_a_resumed_run_is_the_same(two: Workplace) -> None:
    two.run("--run_id", "whole", check=True)
    two.run("--run_id", "cut", "--steps", "2", check=True)
    two.run("--resume", str(two.path / "runs" / "cut"), "--steps", "3", check=True)
    whole, cut = two.lines("whole"), two.lines("cut")
    assert len(whole) == len(cut) == 3
    for line, resumed in zip(whole, cut, strict=True):
        for name in ("teacher_kl", "teacher_kl/adding", "teacher_kl/taking", "loss", "epoch/adding", "epoch/taking"):
            assert line[name] == resumed[name], name
        assert "epoch" not in line
        shares = [line["train/token_share/adding"], line["train/token_share/taking"]]
        assert sum(shares) == pytest.approx(1)
        whole_kl = shares[0] * line["teacher_kl/adding"] + shares[1] * line["teacher_kl/taking"]
        assert line["teacher_kl"] == pytest.approx(whole_kl, rel=1e-5)
    # The student is the tutor at first: what they differ by is what the tutor was told.
    assert abs(whole[0]["teacher_kl/taking"]) > 1e-3
    for step in (1, 2, 3):
        found, again = episodes_of(two, "whole", step), episodes_of(two, "cut", step)
        assert [e.id for e in found] == [e.id for e in again]
        assert [t.token_ids for e in found for t in e.traces] == [t.token_ids for e in again for t in e.traces]
        assert sorted(e.task.source for e in found) == ["adding"] * 4 + ["taking"] * 2
        assert all(e.id.startswith(f"{step}/{e.task.source}/t") and e.env_id == e.task.source for e in found)
    tasks = {e.task.id for step in (1, 2, 3) for e in episodes_of(two, "whole", step)}
    assert len(tasks) == 9  # nobody's epoch is over
    (student,) = (line for line in two.lines("whole", "evals.jsonl") if line["name"] == "student")
    metrics = student["metrics"]
    assert metrics["reward/adding/success"] == 1.0
    assert metrics["reward/taking/success"] == 0.5
    assert metrics["reward/success"] == 0.75


@pytest.mark.slow
def test_a_changed_data_set_and_a_task_without_the_answer_end_the_run_with_words(two: Workplace) -> None:
    two.run("--run_id", "first", "--steps", "1", check=True)
    rows = [json.loads(line) for line in (two.path / "taking" / "train.jsonl").read_text().splitlines()]
    write_jsonl(two.path / "taking" / "train.jsonl", rows[:-1])
    resumed = two.run("--resume", str(two.path / "runs" / "first"), "--steps", "2")
    assert resumed.returncode == 4
    assert "sources.taking.tasks" in resumed.stderr
    assert "has 6 tasks, it had 7" in resumed.stderr
    write_jsonl(two.path / "taking" / "train.jsonl", rows)
    told = json.loads((two.path / "examples.jsonl").read_text())["messages"]
    write_jsonl(two.path / "examples.jsonl", [{"messages": [told[0], {"role": "assistant", "content": "3"}]}])
    resumed = two.run("--resume", str(two.path / "runs" / "first"), "--steps", "2")
    assert resumed.returncode == 4
    assert "teachers.tutor.examples" in resumed.stderr
    assert "has 2 messages, it had 4" in resumed.stderr
    del rows[3]["metadata"]["answer"]
    write_jsonl(two.path / "taking" / "train.jsonl", rows)
    lacking = two.run("--run_id", "second")
    assert lacking.returncode == 2
    assert "teachers.tutor.prompt_fields: task 'taking/t3' has no 'answer'" in lacking.stderr


def test_the_plan_names_sources_and_teachers(two: Workplace) -> None:
    shown = two.run("--dry-run", check=True).stdout
    assert "source        adding, 67% of the tasks" in shown
    assert "1 tools (take), teacher tutor" in shown
    assert "tutor: " in shown
    assert "a system prompt and 1 examples of its own" in shown
