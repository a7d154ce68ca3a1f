"""`python -m envs`, and what docs/write_an_env.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"
DOC = ROOT / "docs" / "write_an_env.md"


def python(*arguments: str, cwd: Path = ROOT, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = python("-m", "envs", "--help")
        times.append(time.monotonic() - began)
        assert done.returncode == 0
        assert "Exit codes" in done.stdout
    assert min(times) < 0.7


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["check"], ["new"], ["check", "x", "--episodes", "many"], ["check", "x", "--episodes", "-1"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_list_imports_nothing_and_shows_where_things_come_from() -> None:
    done = python("-m", "envs", "list", paths=(PLUGINS,))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["medbrowse", "built-in", "envs.medbrowse.env:MedBrowseEnv"] in lines
    assert ["sample/broken", "plug-in", "sample_plugin_broken:BrokenEnv"] in lines
    assert " broken: " not in done.stdout


def test_list_verify_names_the_cause_of_each_broken_one() -> None:
    done = python("-m", "envs", "list", "--verify", "--json", paths=(PLUGINS,))
    assert done.returncode == 1, done.stderr
    problems = {row["id"]: row["problem"] for row in json.loads(done.stdout)}
    assert problems["counting"] == ""
    assert problems["medbrowse"] == ""
    assert "RuntimeError: this plug-in is broken" in problems["sample/broken"]
    assert "NoSuchEnv" in problems["sample/missing"]
    assert "not a subclass" in problems["sample/wrong"]
    assert "broken: environment 'sample/broken'" in python("-m", "envs", "list", "--verify", paths=(PLUGINS,)).stdout


def test_check_of_a_plugin() -> None:
    done = python("-m", "envs", "check", "counting", "--json", "--episodes", "20", paths=(PLUGINS,))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["env"], report["num_episodes"], report["findings"]) == ("counting", 20, [])


def test_check_finds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tools.py").write_text("def broken(:\n")
    assert main(["check", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "tools.py:1: SyntaxError" in printed
    assert "    -> mend" in printed
    assert main(["check", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["check"] == "make"


@pytest.mark.parametrize(
    ("name", "wanted"), [("medbrows", "Did you mean 'medbrowse'"), ("./no/such/folder", "no folder ./no/such/folder")]
)
def test_check_of_nothing(name: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 2
    assert wanted in capsys.readouterr().err


def test_check_with_a_missing_task_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "medbrowse", "--tasks", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_new_works_straight_away(tmp_path: Path) -> None:
    done = python("-m", "envs", "new", "my-env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "wrote ./my-env: eval.jsonl, tests/, tools.py, train.jsonl"
    assert lines[2:] == [
        "  python -m envs check ./my-env",
        "  python -m pytest ./my-env",
        "  python -m distill.run --env ./my-env --student.model MODEL --teacher.model LARGER_MODEL",
    ]
    check = python("-m", "envs", "check", "./my-env", cwd=tmp_path)
    assert check.returncode == 0, check.stdout + check.stderr
    assert check.stdout.endswith("ok\n")
    tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "./my-env", cwd=tmp_path)
    assert tests.returncode == 0, tests.stdout
    assert "2 passed" in tests.stdout


def test_new_is_small(tmp_path: Path) -> None:
    assert main(["new", "mine", "--dir", str(tmp_path / "deep" / "er")]) == 0
    folder = tmp_path / "deep" / "er" / "mine"
    assert len((folder / "tools.py").read_text().splitlines()) <= 35
    assert len((folder / "train.jsonl").read_text().splitlines()) == 30
    train, evaluation = ((folder / f"{split}.jsonl").read_text().splitlines() for split in ("train", "eval"))
    assert not set(train) & set(evaluation)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]  # nothing half-written


def test_new_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["new", "mine", "--dir", str(tmp_path)]) == 2
    assert "exists already; nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "1st", "ä", "x" * 65])
def test_new_refuses_bad_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", name, "--dir", str(tmp_path)]) == 2
    assert "bad name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inside_the_folder_the_message_says_what_to_do(tmp_path: Path) -> None:
    assert main(["new", "mine", "--dir", str(tmp_path)]) == 0
    done = python("-m", "envs", "check", ".", cwd=tmp_path / "mine")
    assert done.returncode == 1
    assert "tools.py hides the package `tools`: run this from another folder" in done.stderr


# The document


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def test_the_class_of_the_document_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    (tmp_path / "dice.py").write_text(code)
    done = python("-W", "error", "dice.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dice = json.loads(done.stdout)
    assert len(dice) == 3
    assert all(1 <= number <= 6 for number in dice)


def test_the_class_of_the_document_keeps_the_contract(tmp_path: Path) -> None:
    (code,) = blocks("python")
    (package,) = blocks("toml")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "dice.py").write_text(code.partition("\nenvs.register")[0])
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    group, _, line = package.partition("\n")
    assert group == '[project.entry-points."distill_gym.envs"]'
    (info / "entry_points.txt").write_text("[distill_gym.envs]\n" + line.replace('"', ""))
    done = python("-m", "envs", "check", "dice", paths=(tmp_path,))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_names_every_check() -> None:
    from envs.check import check_environment

    text = DOC.read_text(encoding="utf-8")
    for name in check_environment("medbrowse", num_episodes=1).checks[1:]:
        assert f"| `{name}` |" in text
