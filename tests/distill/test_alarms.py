"""Alarms: on real series of this trainer (`series/`), and on shapes that are drawn here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from distill.alarms import RULES, AlarmName, alarms_of, lookback
from distill.config import AlarmsConfig
from distill.metrics import repeated_share

SERIES = Path(__file__).parent / "series"
DEFAULT = AlarmsConfig()
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    return [json.loads(raw) for raw in (SERIES / f"{name}.jsonl").read_text().splitlines()]


def steps_on(lines: list[Line], limits: AlarmsConfig = DEFAULT) -> dict[str, list[int]]:
    """By alarm: the steps at which it was on, as a run that goes along would have seen them."""
    found: dict[str, list[int]] = {}
    for end in range(1, len(lines) + 1):
        for alarm in alarms_of(lines[max(0, end - lookback(limits)) : end], limits):
            found.setdefault(alarm.name, []).append(end)
    return found


def healthy(step: int, noise: random.Random) -> Line:
    """A line of a run that learns: the KL falls to noise around a small number, all else is as it should be."""
    kl = 0.15 + 1.5 * 0.9**step
    return {
        "step": step,
        "teacher_kl": kl * noise.uniform(0.8, 1.2),
        "teacher_kl/k2": kl,
        "teacher_kl/above_5": 0.01 * noise.random(),
        "entropy": 0.5 * noise.uniform(0.8, 1.2),
        "mismatch_kl": 0.001 * noise.random(),
        "mismatch_kl/max": 1.1 * noise.random(),
        "ratio/clipped": 0.01 * noise.random(),
        "teacher/coverage": 1.0,
        "rollout/episodes": 64,
        "rollout/sampled_tokens_per_episode": 200 * noise.uniform(0.8, 1.2),
        "rollout/repeated": 0.5 * noise.random(),
        "rollout/truncated": noise.choice([0.0] * 5 + [0.05] * 4 + [0.3]),
        "tool/error_rate": noise.choice([0.0, 0.02, 0.2]),
        "tool/valid_call_rate": noise.uniform(0.7, 1.0),
        "grad_norm": noise.uniform(0.5, 2.0),
        "lr": 1e-5,
        "train/tokens": 12_000,
        "reward": min(1.0, max(0.0, 0.6 + noise.gauss(0, 0.06))),
    }


def run_of(steps: int, change: Callable[[int, Line], Line] = lambda step, line: {}, seed: int = 0) -> list[Line]:
    """A healthy run; from step 61 on, `change` says what is other."""
    noise = random.Random(seed)
    lines = [healthy(step, noise) for step in range(1, steps + 1)]
    return [line | (change(line["step"] - 60, line) if line["step"] > 60 else {}) for line in lines]


@pytest.mark.parametrize("name", ["healthy_0", "healthy_1", "healthy_2", "healthy_3"])
def test_runs_that_learnt_their_task_are_silent(name: str) -> None:
    """The last of them has steps with eight times the KL of their neighbours, and no trend."""
    lines = read(name)
    assert len(lines) >= 36
    assert lines[-1]["teacher_kl"] < 0.05 * lines[0]["teacher_kl"]
    assert steps_on(lines) == {}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_alarm(seed: int) -> None:
    assert steps_on(run_of(120, seed=seed)) == {}


def test_a_learning_rate_that_explodes_is_seen() -> None:
    found = steps_on(read("exploded"))
    assert set(found) == {"kl_far", "entropy_collapse", "truncated", "no_op"}
    assert found["kl_far"][0] == 5
    assert found["entropy_collapse"][0] == 10
    assert found["no_op"][0] == 13  # every probability is 0 or 1: no gradient is left


def test_episodes_that_are_cut_short_are_seen() -> None:
    assert steps_on(read("cut_short")) == {"truncated": [5, 6, 7, 8, 9, 10]}


SHAPES: dict[AlarmName, tuple[Callable[[int, Line], Line], range]] = {
    "kl_rising": (lambda i, _: {"teacher_kl": 0.2 + 0.02 * i}, range(5, 25)),
    "kl_negative": (lambda i, _: {"teacher_kl": -0.3}, range(2, 7)),
    "kl_far": (lambda i, _: {"teacher_kl/above_5": 0.06 + 0.01 * (i % 2)}, range(5, 6)),
    "coverage": (lambda i, _: {"teacher/coverage": 0.99}, range(1, 2)),
    "mismatch": (lambda i, _: {"mismatch_kl": 0.03}, range(1, 2)),
    "mismatch_max": (lambda i, _: {"mismatch_kl/max": 3.0}, range(5, 7)),
    "ratio_clipped": (lambda i, _: {"ratio/clipped": 0.06}, range(5, 6)),
    "entropy_collapse": (lambda i, line: {"entropy": line["entropy"] * 0.9**i}, range(4, 14)),
    "length_growth": (
        lambda i, line: {"rollout/sampled_tokens_per_episode": 200 * 1.05**i},
        range(10, 25),
    ),
    "repetition": (lambda i, _: {"rollout/repeated": 0.9}, range(3, 6)),
    "truncated": (lambda i, _: {"rollout/truncated": 0.3}, range(3, 6)),
    "tool_errors": (lambda i, _: {"tool/error_rate": 0.06}, range(8, 11)),
    "invalid_calls": (lambda i, _: {"tool/valid_call_rate": 0.75}, range(6, 11)),
    "reward_drop": (lambda i, _: {"reward": 0.3}, range(2, 6)),
    "no_op": (lambda i, _: {"grad_norm": 0.0}, range(5, 6)),
}
"""What goes wrong after step 60, and how many steps later its alarm may first be on."""


def test_every_alarm_has_a_name_a_shape_and_help() -> None:
    assert tuple(RULES) == get_args(AlarmName)
    assert set(SHAPES) == set(RULES)
    for rule in RULES.values():
        assert rule.means.endswith(".")
        assert rule.do.endswith(".")


@pytest.mark.parametrize("name", SHAPES)
def test_a_fault_raises_its_own_alarm_and_clears(name: AlarmName) -> None:
    change, first = SHAPES[name]
    lines = run_of(85, change)
    found = steps_on(lines)
    assert set(found) == {name}, found
    assert found[name][0] - 60 in first
    # The fault is mended, and the run goes on as it was: the alarm is off again within two windows and stays off.
    mended = lines + [line | {"step": 85 + i} for i, line in enumerate(run_of(60)[-30:], start=1)]
    assert max(steps_on(mended)[name]) <= 85 + 2 * DEFAULT.window


@pytest.mark.parametrize("name", SHAPES)
def test_none_switches_an_alarm_off_and_stop_marks_it(name: AlarmName) -> None:
    lines = run_of(85, SHAPES[name][0])
    at = steps_on(lines)[name][0]
    (alarm,) = alarms_of(lines[:at], AlarmsConfig(stop=(name,)))
    assert alarm.stops
    keys = {"kl_rising": "kl_rise", "mismatch": "mismatch_kl", "invalid_calls": "valid_calls"}
    off: Any = False if name == "no_op" else None
    assert steps_on(lines, AlarmsConfig.model_validate({keys.get(name, name): off})) == {}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_computed_raises_nothing(name: AlarmName) -> None:
    lines = run_of(85, SHAPES[name][0])
    bare = [{"step": line["step"]} for line in lines]
    empty: list[Line] = [dict.fromkeys(line) | {"step": line["step"]} for line in lines]
    assert steps_on(bare) == steps_on(empty) == {}


def test_repeated_sequences_are_counted_within_a_turn() -> None:
    assert repeated_share(range(100)) == 0.0
    assert repeated_share([5] * 12) == pytest.approx(8 / 9)
    assert repeated_share([1, 2, 3, 4] * 25) == pytest.approx(1 - 4 / 97)
    assert repeated_share([0, 0, 0, 1, 0, 0, 0, 2]) == 0.0  # zeros are tokens too
    assert repeated_share([1] * 6) is None


def test_a_student_that_arrives_loses_entropy_without_an_alarm() -> None:
    """The same fall of the entropy, with and without the KL that falls with it."""
    falling = [line | {"entropy": 2.0 * 0.93**i, "teacher_kl": 3.0 * 0.93**i} for i, line in enumerate(run_of(50))]
    assert "entropy_collapse" not in steps_on(falling)
    stuck = [line | {"teacher_kl": 3.0} for line in falling]
    assert "entropy_collapse" in steps_on(stuck)


def test_a_teacher_that_is_the_student_is_a_no_op() -> None:
    lines = [line | {"teacher_kl": 1e-7, "teacher_kl/k2": 1e-13} for line in run_of(10)]
    (alarm,) = alarms_of(lines, DEFAULT)
    assert alarm.name == "no_op"
    assert "same probability" in alarm.seen
