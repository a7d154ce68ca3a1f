"""Every file of `configs/` trains: here those that need neither vLLM nor a browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import test_cpu_default
from tests.runs.config_cases import CASES, FOLDER, ROOT, WHOLE, check_run, flags


def test_every_file_has_a_case() -> None:
    assert not {file.stem for file in FOLDER.glob("*.toml")} - {*CASES, *WHOLE}
    assert (test_cpu_default.CONFIG.stem,) == WHOLE


@pytest.mark.slow
@pytest.mark.timeout(1200)  # where built-in models have to be made first
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.suite == "slow"])
def test_a_file_trains_two_steps(name: str, tmp_path: Path) -> None:
    CASES[name].prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "distill.run", *flags(name)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check_run(tmp_path / "runs" / "run", name)
