"""What the CPU default promises, on three seeds: from nothing to a student as good as its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cpu_default import measure
from distill.models import cache_folder
from tests.runs.config_cases import check_steps

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "medbrowse_cpu.toml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_damaged_student_wins_its_skill_back(tmp_path: Path, seed: int) -> None:
    """Two seeds begin with an empty cache; seed 0 takes the models that other tests have made, if they have."""
    cache = tmp_path / "cache" if seed else cache_folder().parent
    row = measure(str(CONFIG), seed, cache, tmp_path / "runs", "cold")
    check_steps(tmp_path / "runs" / f"seed{seed}-cold", 36)
    assert row["episodes_an_evaluation"] >= 500
    assert row["teacher"] >= 0.95
    assert 0.10 <= row["before"] <= 0.40
    assert row["after"] >= 0.95 * row["teacher"]
    assert row["kl_fall"] >= 5
