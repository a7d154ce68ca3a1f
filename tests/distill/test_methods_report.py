"""What `bench.methods` reads out of curves."""

from __future__ import annotations

from bench.methods_report import Point, crossing, success_at


def curve(*successes: float) -> list[Point]:
    return [Point(steps=2 * i, trained=100 * i, handled=300 * i, success=s) for i, s in enumerate(successes)]


def test_one_lucky_evaluation_is_no_crossing() -> None:
    points = curve(0.2, 0.95, 0.9, 0.95, 0.96, 0.97)
    assert crossing(points, 0.95) == points[3]
    assert crossing(curve(0.2, 0.9, 0.95), 0.95) is not None, "nothing after it says otherwise"
    assert crossing(curve(0.2, 0.95, 0.9), 0.95) is None
    assert crossing(curve(0.99), 0.95) == curve(0.99)[0]


def test_success_between_two_evaluations() -> None:
    points = curve(0.2, 0.6, 0.8)
    assert success_at(points, 3, lambda p: p.steps) == 0.7
    assert success_at(points, 200, lambda p: p.trained) == 0.8
    assert success_at(points, 0, lambda p: p.trained) == 0.2
    assert success_at(points, 201, lambda p: p.trained) is None, "the run is shorter"
