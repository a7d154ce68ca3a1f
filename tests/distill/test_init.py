"""`python -m distill.init`: what it writes loads, is planned, and trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config_load import load_config
from distill.init import EXIT_OK, EXIT_USAGE, TEMPLATES, main
from distill.plan import plan
from envs.check import check_environment
from envs.dataset import read_tasks
from tests.runs.config_cases import check_steps
from tests.runs.conftest import save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*flags: str) -> list[float]:
    """Two steps in a process of their own; `teacher_kl` of each."""
    done = subprocess.run(
        [sys.executable, "-m", "distill.run", "--steps", "2", "--run-id", "r", "--optim.warmup_steps", "0", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line["teacher_kl"] for line in check_steps(Path("runs/r"), 2)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_written_loads_and_is_planned(template: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sub/my_project", "--template", template]) == EXIT_OK
    assert "--config ./sub/my_project/config.toml --dry-run" in capsys.readouterr().out
    config = load_config(["sub/my_project/config.toml"]).config
    assert f"environment   {config.env}" in plan(config)
    assert not config.notes()
    tasks = "tasks.jsonl" if template == "medbrowse" else "train.jsonl"
    assert len(read_tasks(Path("sub/my_project") / tasks)) >= 8
    lines = Path("sub/my_project/README.md").read_text().splitlines()
    assert len(lines) == 10
    assert [line.split("#")[0].split()[2] for line in lines if line.startswith("    python")] == [
        "distill.run", "distill.check", "distill.run", "agent_loop.view"
    ]  # fmt: skip
    assert sorted(Path("sub").iterdir()) == [Path("sub/my_project")]


@pytest.mark.parametrize("template", ["reasoning", "tools"])
def test_the_folder_is_an_environment_that_keeps_the_contract(template: str, place: Path) -> None:
    main(["p", "--template", template])
    report = check_environment("./p", num_episodes=10)
    assert report.findings == []
    assert report.tools == (["price", "submit_answer"] if template == "tools" else [])
    held_out = {task.id for task in read_tasks("p/eval.jsonl")}
    assert not held_out & {task.id for task in read_tasks("p/train.jsonl")}


def test_what_is_there_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "full").mkdir()
    (place / "full" / "mine").write_text("x")
    assert main(["full", "--template", "tools"]) == EXIT_USAGE
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in (place / "full").iterdir()] == ["mine"]
    (place / "file").write_text("x")
    assert main(["file", "--template", "reasoning"]) == EXIT_USAGE
    assert main(["bad name", "--template", "reasoning"]) == EXIT_USAGE
    (place / "empty").mkdir()
    assert main(["empty", "--template", "reasoning"]) == EXIT_OK
    assert (place / "empty" / "config.toml").is_file()
    assert sorted(p.name for p in place.iterdir()) == ["empty", "file", "full"]


def test_the_tools_template_trains_two_steps(place: Path) -> None:
    main(["p", "--template", "tools"])
    models = [
        f"--{name}.model={save_model(place / name, seed=seed)}" for name, seed in (("student", 1), ("teacher", 2))
    ]
    small = ["--rollout.batch_size=2", "--rollout.max_turns=2", "--rollout.max_turn_tokens=8", "--eval.num_tasks=1"]
    kl = train("--config", "p/config.toml", *models, *small)
    assert len(kl) == 2
    assert min(kl) > 0


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_trains_two_steps_as_it_is_written(template: str, place: Path) -> None:
    main(["p", "--template", template])
    assert len(train("--config", "p/config.toml", "--eval.num_tasks", "4")) == 2


@pytest.mark.slow
def test_the_medbrowse_tasks_are_tasks_of_its_environment(place: Path) -> None:
    main(["p", "--template", "medbrowse"])
    assert len(train("--config", "p/config.toml", "--tasks.train", "p/tasks.jsonl", "--eval.at_start", "false")) == 2
