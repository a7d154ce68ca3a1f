"""The continual-learning recipe in small: the skill falls, comes back, and what was learnt stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.continual import Lab, Sizes, made

SMALL = Sizes(num_ships=12, num_replayed=40, steps=12, every=12, num_tasks=100, samples=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_distillation_from_the_original_wins_the_skill_back_and_keeps_the_knowledge(tmp_path: Path) -> None:
    result = made(Lab(tmp_path / "seed0", 0, SMALL), "recipe")
    original, mixed, regained = result["points"]
    assert original["skill"] >= 0.95
    assert original["knowledge"] <= 0.05
    assert mixed["skill"] <= original["skill"] - 0.15
    assert mixed["knowledge"] >= 0.6
    assert regained["skill"] >= mixed["skill"] + 0.1
    assert regained["knowledge"] >= 0.8 * mixed["knowledge"]
