"""The examples of prime-rl's, rnow's and verl's documentation, imported, train two steps on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.serving import served
from distill.config_load import load_config
from distill.import_config import EXIT_OK, main
from distill.init import write_project
from tests.distill.test_import_config import EXAMPLES, REWARDS, TOOLS, place
from tests.runs.config_cases import STEPS, check_steps
from tests.runs.conftest import save_model

__all__ = ["place"]  # the fixture

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

SHORT = {"steps": str(STEPS), "rollout.batch_size": "2", "rollout.max_turns": "2", "rollout.max_turn_tokens": "8"}
NO_SERVERS = {"student.server": "none", "teacher.server": "none"}
OVERRIDES = {
    "same.toml": SHORT | NO_SERVERS | {"teacher.model": "teacher"},
    "other.toml": SHORT | NO_SERVERS | {"teacher.model": "teacher"},
    # The teacher runs elsewhere: at an address of this machine.
    "elsewhere.toml": SHORT | {"student.server": "none", "teacher.model": "teacher", "teacher.base_url": "{teacher}"},
    "pure.toml": SHORT | NO_SERVERS | {"teacher.model": "teacher"},
    "newer.toml": SHORT | {"student.server": "none", "teacher.model": "teacher", "teacher.base_url": "{teacher}"},
    # Four bits need a GPU.
    "config.yml": NO_SERVERS
    | {
        "steps": str(STEPS),
        "rollout.max_turn_tokens": "8",
        "student.model": "student",
        "student.lora.quantization": "none",
        "teacher.model": "teacher",
    },
    "run.sh": {
        "steps": str(STEPS),
        "rollout.max_turn_tokens": "8",
        "student.model": "student",
        "teacher.model": "teacher",
        "tasks.train": "train.jsonl",
        "tasks.eval": "test.jsonl",
    },
}
"""By example, all that is not as it was imported; the student of prime-rl's is given to the importer."""


def rnow_folder(folder: Path) -> None:
    """What stands beside `config.yml`."""
    (folder / "tools.py").write_text(TOOLS)
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"messages": [{"role": "user", "content": f"add {i} and 2"}], "metadata": {"answer": str(i + 2)}}
            for i in range(8)]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def verl_data(folder: Path) -> None:
    """GSM8K's shape as verl's own preparation writes it: examples/data_preprocess/gsm8k.py."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": f"add the numbers {i} and 2"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(i + 2)},
                "extra_info": {"split": split, "index": i},
            }
            for i in range(8)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")


def run_printed(report: str, place: Path) -> None:
    """The commands that the report prints, in a shell, as a user would."""
    commands = re.findall(r"make one: (python .*?\.jsonl);", re.sub(r"\s+", " ", report))
    assert len(commands) == 2
    (place / "convert_dataset.py").symlink_to(ROOT / "convert_dataset.py")
    for command in commands:
        words = command.replace("python ", f"{sys.executable} ", 1)
        done = subprocess.run(
            words, shell=True, env=ENVIRONMENT | {"HOME": str(place)}, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_two_steps(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(place / "student", seed=1)
    teacher = save_model(place / "teacher", seed=2)
    (place / "theirs").mkdir()
    source = place / "theirs" / name
    source.write_text(EXAMPLES[name])
    options = []
    if name == "config.yml":
        rnow_folder(place / "theirs")
    elif name == "run.sh":
        verl_data(place / "data" / "gsm8k")
    else:
        write_project(place / "p", "tools")
        options = ["--env", "./p", "--student", "student"]
    assert main([str(source), "--out", "new.toml", *options]) == EXIT_OK
    report = capsys.readouterr().out
    if name == "run.sh":
        run_printed(report, place)
    else:
        assert "impossible" not in report
    config = load_config(["new.toml"]).config
    if "{teacher}" in OVERRIDES[name].values():
        assert config.teacher.base_url
        assert config.teacher.server is None
        with served(teacher, teacher.name, environment=ENVIRONMENT) as server:
            train(name, server.base_url)
    else:
        train(name, "")
    check_steps(Path("runs/run"), STEPS)


def train(name: str, url: str) -> None:
    flags = [word for key, value in OVERRIDES[name].items() for word in (f"--{key}", value.replace("{teacher}", url))]
    done = subprocess.run(
        [sys.executable, "-m", "distill.run", "--config", "new.toml", "--run-id", "run", *flags],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
