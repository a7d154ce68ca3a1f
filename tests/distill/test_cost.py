"""What a run is said to cost and to wait for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from distill.config import RunConfig
from distill.cost import Activity, BusyClock, StepClock, bottleneck, cost_lines, gpus_of


def config(student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    tree = {"student": {"model": "s"} | (student or {}), "teacher": {"model": "t"} | (teacher or {})}
    return RunConfig(env="none", **tree, **more)  # type: ignore[arg-type]


def test_overlapping_work_is_counted_once() -> None:
    clock, began = BusyClock(), time.monotonic()
    with clock:
        time.sleep(0.01)
        with clock:
            time.sleep(0.01)
        assert 0.02 <= clock.busy_s <= time.monotonic() - began
    busy = clock.busy_s
    time.sleep(0.01)
    assert clock.busy_s == busy


def test_the_stages_of_a_step_add_up_and_idle_is_what_is_left() -> None:
    activity = Activity()
    clock = StepClock(activity, {"trainer": 2, "teacher": 4})
    time.sleep(0.01)  # an evaluation: it holds GPUs, and is no part of the step
    clock.start()
    with activity.rollout:
        time.sleep(0.02)
    clock.lap("idle/trainer")
    time.sleep(0.01)
    clock.lap("time/train")
    found = clock.metrics({"teacher/tokens": 600, "train/tokens": 200, "rollout/sampled_tokens": 250})
    seconds = found["time/step"]
    assert seconds is not None
    laps = found["idle/trainer"], found["time/train"]
    assert sum(v or 0.0 for v in laps) == pytest.approx(seconds, abs=2e-3)
    assert found["idle/rollout"] == pytest.approx(laps[1], abs=5e-3)
    assert found["idle/teacher"] == pytest.approx(seconds, abs=1e-3)
    assert found["cost/teacher_tokens_per_trained"] == 3.0
    assert found["cost/trained_per_sampled"] == 0.8
    assert found["cost/gpu_s"] == pytest.approx(6 * seconds, rel=0.1)
    time.sleep(0.02)
    clock.start()
    after = clock.metrics({})
    assert after["cost/teacher_tokens_per_trained"] is None, "not computed, rather than 0"
    assert after["cost/gpu_s/teacher"] == pytest.approx(4 * 0.02, rel=0.5), "what lay between the steps counts"


@pytest.mark.parametrize(
    ("given", "machine_has_gpu", "trainer_gpus", "wanted"),
    [
        (config(), False, 0, {"trainer": None}),
        (config(), True, 2, {"trainer": 2}),
        (
            config({"server": {}}, {"server": {"tensor_parallel": 2, "data_parallel": 3}}),
            True,
            1,
            {"trainer": 1, "student": 1, "teacher": 6},
        ),
        (config({"server": {}}), False, 0, {"trainer": None, "student": None}),
        (config({"base_url": "http://h/v1"}), True, 1, {"trainer": 1, "student": None}),
        (
            config({"base_url": "http://h/v1"}, cost={"student_gpus": 8}),
            False,
            1,
            {"trainer": 1, "student": 8},
        ),
        (
            config({"server": {}, "lora": {}}, {"model": None, "system_prompt": "x", "on_student_server": True}),
            True,
            1,
            {"trainer": 1, "student": 1},
        ),
    ],
)
def test_gpus_are_counted_by_role_and_unknown_ones_are_none(
    given: RunConfig, machine_has_gpu: bool, trainer_gpus: int, wanted: dict[str, int | None]
) -> None:
    assert gpus_of(given, machine_has_gpu=machine_has_gpu, trainer_gpus=trainer_gpus) == wanted


def test_an_estimate_that_lacks_a_role_is_none() -> None:
    found = StepClock(Activity(), {"trainer": 1, "student": None}).metrics({})
    assert found["cost/gpu_s"] is None
    assert found["cost/gpu_s/trainer"] is not None


def line(**values: float) -> dict[str, float]:
    names = {"waited": "idle/trainer", "scores": "idle/trainer_for_scores", "idle": "idle/rollout"}
    names |= {name: f"time/{name}" for name in ("step", "train", "publish", "tools", "sampling")}
    return {names[name]: value for name, value in values.items()}


@pytest.mark.parametrize(
    ("max_staleness", "steps", "words"),
    [
        (
            0,
            line(step=10, waited=4, train=5, publish=1, sampling=3, tools=1),
            ["at best 1.7x", "trainer is the slower"],
        ),
        (
            0,
            line(step=10, waited=7, train=3, tools=5, sampling=1),
            ["rollout.max_staleness = 1", "83% of their time in"],
        ),
        (0, line(step=10, waited=9.5, train=0.5, sampling=3), ["95% of a step", "more student servers"]),
        (1, line(step=10, waited=4, scores=3, train=6), ["waits for episodes 40%", "more teacher servers"]),
        (1, line(step=10, waited=4, scores=1, train=6, sampling=2), ["more student servers"]),
        (1, line(step=10, waited=0.2, idle=6, train=9.8), ["wait for new weights 60%", "more GPUs"]),
        (2, line(step=10, waited=0.2, idle=0.3, train=9.8), ["bottleneck: none"]),
    ],
)
def test_the_bottleneck_is_named_with_what_to_do(max_staleness: int, steps: dict[str, float], words: list[str]) -> None:
    first = line(step=1000, waited=1000)  # has nothing to overlap with
    said = bottleneck([first, steps, steps], max_staleness)
    assert said is not None
    for word in words:
        assert word in said, said


def test_no_gain_is_promised_where_there_is_none() -> None:
    said = bottleneck([line(step=10, waited=9.8, train=0.2)], 0)
    assert said is not None
    assert "max_staleness" not in said
    assert bottleneck([], 0) is None


def test_totals_are_over_the_steps_that_have_them() -> None:
    step = {"rollout/sampled_tokens": 500, "train/tokens": 400, "teacher/tokens": 1200, "time/step": 2.0}
    gpus = {"cost/gpu_s/trainer": 2.0, "cost/gpu_s/student": None}
    said = cost_lines([step | gpus, step | gpus | {"teacher/tokens": None}])
    assert said[0].startswith("tokens: 1,000 sampled, 800 trained (80%), 1,200 sent")
    assert "4.0 in 2 steps" in said[1]
    assert "training -" in said[1]
    assert said[2] == "GPU-seconds: trainer 4; not known: student"
    assert cost_lines([step | {"cost/gpu_s/trainer": None}])[2] == "GPU-seconds: none"
