"""Every environment that is shipped or installed keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

import envs
from envs.check import check_environment
from envs.new import write_environment
from envs.registry import EnvEntry, load

ENTRIES = [entry for entry in envs.list_envs() if entry.source != "registered"]
"""As known when this file is collected: before other tests register theirs."""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_shipped_and_installed(entry: EnvEntry, tmp_path: Path) -> None:
    load(entry)
    tasks = None
    if not envs.make(entry.id).default_tasks():  # it plays whatever tasks it is given
        tasks = tmp_path / "tasks.jsonl"
        tasks.write_text('{"messages": [{"role": "user", "content": "2 + 3?"}], "metadata": {"answer": "5"}}\n')
    report = check_environment(entry.id, tasks=tasks)
    assert report.findings == []
    assert report.num_episodes == 100


@pytest.mark.parametrize("options", [{}, {"max_hops": 1}, {"split": "test"}], ids=str)
def test_medbrowse_plays_from_the_seed(options: dict[str, object]) -> None:
    first, second = envs.make("medbrowse", **options), envs.make("medbrowse", **options)
    assert first.reset(seed=7) == second.reset(seed=7)


def test_what_new_writes(tmp_path: Path) -> None:
    assert check_environment(str(write_environment("shop", tmp_path))).findings == []
