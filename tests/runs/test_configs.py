"""Every file of `configs/` trains: here those that need neither vLLM nor a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import test_cpu_default
from tests.runs.config_cases import CASES, FOLDER, WHOLE, train


def test_every_file_has_a_case() -> None:
    assert not {file.stem for file in FOLDER.glob("*.toml")} - {*CASES, *WHOLE}
    assert (test_cpu_default.CONFIG.stem,) == WHOLE


@pytest.mark.slow
@pytest.mark.timeout(1200)  # where built-in models have to be made first
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.suite == "slow"])
def test_a_file_trains_two_steps(name: str, tmp_path: Path) -> None:
    CASES[name].prepare(tmp_path)
    train(name, tmp_path, timeout_s=1150)
