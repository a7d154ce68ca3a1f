"""`python -m distill.run --episodes`: training on stored episodes, and where they cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distill.run
import distill.score
from agent_loop.episodes import read_episodes
from agent_loop.types import Episode
from distill.config_load import load_config
from distill.student import Student
from distill.tasks import TaskSource
from tests.runs.conftest import Workplace, make_workplace


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A run of two steps of six episodes."""
    workplace = make_workplace(tmp_path_factory.mktemp("played"), models)
    workplace.run("--run-id", "one", "--steps", "2", check=True)
    return workplace.path / "runs" / "one"


@pytest.fixture
def offline(tmp_path: Path, models: Path, played: Path) -> Workplace:
    """A configuration that names no environment and no teacher."""
    values = {
        "episodes": f'"{played}"',
        "student.model": f'"{models / "student"}"',
        "steps": "4",
        "rollout.batch_size": "5",
        "rollout.group_size": "1",
        "optim.lr": "1e-3",
        "checkpoint.every": "1",
    }
    (tmp_path / "run.toml").write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return Workplace(tmp_path)


def files_of(played: Path) -> list[Path]:
    return sorted((played / "episodes").glob("step_*.jsonl"))


def copied(played: Path, path: Path) -> list[dict[str, Any]]:
    """All episodes in one file, and their JSON."""
    path.write_text("".join(file.read_text() for file in files_of(played)))
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "model" / "model.safetensors")


def test_a_stored_run_is_training_on_its_episodes(offline: Workplace, played: Path, models: Path) -> None:
    done = offline.run("--run-id", "whole", check=True)
    assert done.stderr.count("off policy by construction") == 1
    lines = offline.lines("whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [pytest.approx(5 * step / 12) for step in (1, 2, 3, 4)]
    assert lines[0]["mismatch_kl"] < lines[-1]["mismatch_kl"]  # the student moves away from who sampled
    assert not list((offline.path / "runs" / "whole" / "episodes").iterdir())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = load_config([offline.path / "run.toml"]).config
        student = Student.load(models / "student", config)
        episodes = [e for file in files_of(played) for e in read_episodes(file) if isinstance(e, Episode)]
        source = TaskSource(episodes, seed=config.seed)
        for line in lines:
            metrics = student.train_step(source.take(5), step=line["step"])
            assert line["teacher_kl"] == pytest.approx(metrics["teacher_kl"], abs=1e-6)
            assert line["train/tokens"] == metrics["train/tokens"]
    finally:
        torch.set_num_threads(threads)
    expected = student.state_dict_for_serving()
    found = weights(offline.path / "runs" / "whole", 4)
    start = load_file(models / "student" / "model.safetensors")
    assert any(not torch.equal(found[name], start[name]) for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_resume_goes_on_as_if_it_had_never_stopped(offline: Workplace, played: Path) -> None:
    stored = offline.path / "stored.jsonl"
    rows = copied(played, stored)
    flags = ("--episodes", str(stored))
    offline.run("--run-id", "whole", *flags, check=True)
    offline.run("--run-id", "halved", *flags, "--steps", "2", check=True)
    halved = offline.path / "runs" / "halved"
    offline.run("--resume", str(halved), *flags, "--steps", "4", check=True)
    whole = weights(offline.path / "runs" / "whole", 4)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(halved, 4).items())
    assert [line["teacher_kl"] for line in offline.lines("halved")] == [
        line["teacher_kl"] for line in offline.lines("whole")
    ]
    write(stored, rows[1:])
    refused = offline.run("--resume", str(halved), *flags, "--steps", "5")
    assert refused.returncode == 4
    assert "has 11 episodes, it had 12" in refused.stderr


def dry_run(offline: Workplace, episodes: Path, *flags: str) -> int:
    return distill.run.main(
        ["--config", str(offline.path / "run.toml"), "--episodes", str(episodes), "--dry-run", *flags]
    )


def test_the_plan_counts_what_there_is(offline: Workplace, played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(offline, played) == 0
    assert "12 stored episodes" in capsys.readouterr().out


def test_an_unscored_episode_is_refused_with_words(
    offline: Workplace, played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = offline.path / "stored.jsonl"
    rows = copied(played, stored)
    mask = rows[3]["traces"][0]["loss_mask"]
    rows[3]["traces"][0]["teacher_logprobs"][mask.index(1)] = None
    assert dry_run(offline, write(stored, rows)) == 4
    said = capsys.readouterr().err
    assert f"{stored}:4: trace 0" in said
    assert f"token {mask.index(1)} is to be trained on but has no teacher log-probability" in said
    assert "python -m distill.score" in said
    rows[3]["traces"][0]["teacher_logprobs"] = None
    assert dry_run(offline, write(stored, rows)) == 4
    assert f"{stored}:4: trace 0" in capsys.readouterr().err


def test_candidates_are_counted(offline: Workplace, played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(offline, played, "--loss.type", "topk", "--teacher.top_k", "4") == 4
    assert "has 0 candidates of the teacher; teacher.top_k is 4" in capsys.readouterr().err


def test_a_torn_line_is_named(offline: Workplace, played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = offline.path / "stored.jsonl"
    copied(played, stored)
    stored.write_text(stored.read_text()[:-50])
    assert dry_run(offline, stored) == 4
    assert f"{stored}:12: torn" in capsys.readouterr().err


def test_episodes_without_a_score_are_left_out_and_counted(
    offline: Workplace, played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = offline.path / "stored.jsonl"
    rows = copied(played, stored)
    for row in rows[:2]:
        row["traces"][0]["teacher_logprobs"] = None
        row["error"] = {"boundary": "teacher", "kind": "not_finite", "message": "nan"}
    assert dry_run(offline, write(stored, rows)) == 0
    said = capsys.readouterr().out
    assert "10 stored episodes" in said
    assert "2 x teacher/not_finite: nan" in said
    assert dry_run(offline, stored, "--teacher.max_dropped_fraction", "0.1") == 4
    assert "17% of the episodes have no teacher score" in capsys.readouterr().err


def test_a_student_of_another_vocabulary_is_refused(offline: Workplace, models: Path) -> None:
    done = offline.run("--student.model", str(models / "stranger"))
    assert done.returncode == 4
    assert "its ids are" in done.stderr
    assert "Traceback" not in done.stderr


def test_rewards_need_groups(offline: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(offline, offline.path, "--loss.adv_tau", "0.5") == 2
    assert "loss.adv_tau" in capsys.readouterr().err


def test_a_teacher_in_this_process_gives_the_numbers_of_the_run(
    tmp_path: Path, played: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    flags = [str(played), "--teacher", str(models / "teacher"), "--out", str(tmp_path / "scored"), *cache]
    assert distill.score.main(flags) == 0
    for file in files_of(played):
        for was, now in zip(read_episodes(file), read_episodes(tmp_path / "scored" / file.name), strict=True):
            assert isinstance(was, Episode)
            assert isinstance(now, Episode)
            for old, new in zip(was.traces, now.traces, strict=True):
                assert new.teacher_logprobs == pytest.approx(old.teacher_logprobs, abs=1e-4)
    assert "12 of 12 episodes scored" in capsys.readouterr().out
    stranger = [str(played), "--teacher", str(models / "stranger"), "--out", str(tmp_path / "other"), *cache]
    assert distill.score.main(stranger) == 4
    assert "take a model of the same vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_system_prompt_is_another_question(
    tmp_path: Path, played: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Add them.")
    environment = str(played.parents[1] / "adding")
    flags = [str(played), "--teacher", str(models / "teacher"), "--cache", str(tmp_path / "cache")]
    told = [*flags, "--system-prompt", str(prompt), "--env", environment]
    assert distill.score.main([*flags, "--out", str(tmp_path / "plain")]) == 0
    assert distill.score.main([*told, "--out", str(tmp_path / "told")]) == 0
    assert capsys.readouterr().out.count("12 of 12 episodes scored") == 2
    name = files_of(played)[0].name
    assert (tmp_path / "plain" / name).read_bytes() != (tmp_path / "told" / name).read_bytes()
