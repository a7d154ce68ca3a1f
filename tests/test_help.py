"""`--help` of every command: it answers, and loads nothing that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "renderers", "tokenizers", "datasets", "pyarrow", "pandas", "matplotlib", "peft"}
"""Each takes a second or more to import on a cold disk; with none of them `--help` takes 0.1 to 0.4 s."""

COMMANDS = [
    ("-m", "distill.run"),
    ("-m", "distill.check"),
    ("-m", "distill.collect"),
    ("-m", "distill.sft"),
    ("-m", "distill.export"),
    ("-m", "distill.score"),
    ("-m", "distill.track"),
    ("-m", "distill.config"),
    ("-m", "distill.import_config"),
    ("-m", "distill.init"),
    ("-m", "distill.serving.embedded"),
    ("-m", "agent_loop.rollout"),
    ("-m", "agent_loop.view"),
    ("-m", "envs"),
    ("-m", "tools.pages"),
    ("convert_dataset.py",),
]


def imported(importtime: str) -> set[str]:
    """Top-level packages in the report of `python -X importtime`: `import time: self | cumulative | name`."""
    lines = [line for line in importtime.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_answers_and_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")
    loaded = imported(done.stderr)
    assert "argparse" in loaded  # the report was read
    assert not loaded & HEAVY
