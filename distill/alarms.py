"""Alarms over the last lines of `metrics.jsonl`: what was seen, what it usually means, what to do.

Pure functions without state: whether an alarm is new is told by the lines themselves (`alarm/<name>` is 1 where it was
on). Thresholds are keys of `[alarms]`; "none" switches one off. They were set so that healthy runs of the CPU default
are silent: a student that learns from a sharp teacher loses entropy, and its KL is noise once it has arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from distill.config import AlarmsConfig

BEFORE = 50
"""Steps, at most, between the two windows that a slow change is judged by."""
ARRIVED = 0.1
"""Nats a token. A student nearer to its teacher than this has little left to lose; its KL and entropy are noisy."""
SHARP = 0.2
"""Nats. Below this an entropy says little: one sure token more or less halves it."""
TREND = 3.5
"""Standard deviations of a trend that is not chance: one such in 4,000 series without any."""
SAME = 1e-9
"""Squared nats. Log-ratios of this mean square are rounding errors of two equal models."""

AlarmName = Literal[
    "kl_rising",
    "kl_negative",
    "kl_far",
    "coverage",
    "mismatch",
    "mismatch_max",
    "ratio_clipped",
    "entropy_collapse",
    "length_growth",
    "repetition",
    "truncated",
    "tool_errors",
    "invalid_calls",
    "reward_drop",
    "no_op",
]
Line = Mapping[str, Any]
Find = Callable[[Sequence[Line], "AlarmsConfig"], str | None]
"""Lines, oldest first, at least one -> what was seen at the last of them. None: nothing, or it cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One thing that is wrong at the last line."""

    name: AlarmName
    """As in `alarm/<name>` and `alarms.stop`."""
    stops: bool
    """The run is to end here: `alarms.stop` names it."""
    seen: str
    """The numbers."""
    means: str
    """What it usually is."""
    do: str
    """What helps."""

    def __str__(self) -> str:
        return f"ALARM {self.name}: {self.seen}. {self.means} {self.do}"


@dataclass(frozen=True, slots=True)
class Rule:
    find: Find
    means: str
    do: str


def alarms_of(lines: Sequence[Line], limits: AlarmsConfig) -> list[Alarm]:
    """The alarms that are on at the last line.

    Args:
        lines: of `metrics.jsonl`, oldest first; those of the last `lookback(limits)` steps are enough.
    """
    found = []
    for name, rule in RULES.items():
        seen = rule.find(lines, limits) if lines else None
        if seen is not None:
            found.append(Alarm(name=name, stops=name in limits.stop, seen=seen, means=rule.means, do=rule.do))
    return found


def lookback(limits: AlarmsConfig) -> int:
    """Lines that the rules look at."""
    return BEFORE + 4 * limits.window


def values_of(lines: Sequence[Line], name: str) -> list[float]:
    """The numbers of the lines that have one."""
    return [float(line[name]) for line in lines if line.get(name) is not None]


def window_mean(lines: Sequence[Line], name: str, window: int, back: int = 0) -> float | None:
    """Mean over the `window` lines that end `back` lines before the last; None unless each of them has the number."""
    end = len(lines) - back
    values = values_of(lines[max(0, end - window) : max(0, end)], name)
    return fmean(values) if len(values) == window else None


def sustained(name: str, key: str, form: str, *, below: bool = False, windows: int = 1) -> Find:
    """The number is beyond the threshold `key` in every step of `windows` windows."""

    def find(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
        limit, steps = getattr(limits, key), windows * limits.window
        values = values_of(lines[-steps:], name)
        if limit is None or len(values) < steps:
            return None
        if not all(value < limit if below else value > limit for value in values):
            return None
        side = "below" if below else "above"
        return f"{name} is {form.format(values[-1])}, {side} {form.format(limit)} for {steps} steps"

    return find


def at_once(name: str, key: str, form: str, *, below: bool = False) -> Find:
    """The number of the last step is beyond the threshold `key`."""

    def find(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
        limit, value = getattr(limits, key), lines[-1].get(name)
        if limit is None or value is None or not (value < limit if below else value > limit):
            return None
        return f"{name} is {form.format(value)}, {'below' if below else 'above'} {form.format(limit)}"

    return find


def kl_rising(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """Over four windows `teacher_kl` rose by the share `kl_rise`, from the first's median to the last's, and it rises
    in more pairs of steps than chance allows: Kendall's S (Mann 1945) above `TREND` of its standard deviations. Ranks,
    for single steps may be many times the others."""
    steps = 4 * limits.window
    values = values_of(lines[-steps:], "teacher_kl")
    if limits.kl_rise is None or len(values) < steps:
        return None
    first, last = median(values[: limits.window]), median(values[-limits.window :])
    score = sum((b > a) - (b < a) for a, b in combinations(values, 2))
    deviation = math.sqrt(steps * (steps - 1) * (2 * steps + 5) / 18)
    if last < ARRIVED or last - first < limits.kl_rise * abs(first) or score < TREND * deviation:
        return None
    return f"teacher_kl rose from {first:.3f} to {last:.3f} over {steps} steps"


def kl_negative(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """The mean over a window is negative by more than chance allows; a KL is not.

    Standard error of a step's mean from `teacher_kl/k2` = E[r^2] / 2 of the log-ratios r: sqrt(2 k2 / n).
    """
    last = lines[-limits.window :]
    mean = window_mean(lines, "teacher_kl", limits.window)
    k2, tokens = window_mean(lines, "teacher_kl/k2", limits.window), sum(values_of(last, "train/tokens"))
    if limits.kl_negative is None or mean is None or k2 is None or not tokens:
        return None
    if mean >= -max(limits.kl_negative, 3 * math.sqrt(2 * k2 / tokens)):
        return None
    return f"teacher_kl is {mean:.4f} over {limits.window} steps and {tokens:,.0f} tokens"


def entropy_collapse(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """Entropy fell to less than the share `entropy_collapse` of what it was up to 50 steps before, and the student
    came no nearer to the teacher."""
    return _changed(
        lines,
        limits.window,
        "entropy",
        lambda then, now: limits.entropy_collapse is not None and then > SHARP and now < limits.entropy_collapse * then,
    )


def length_growth(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """Episodes grew to `length_growth` times what they were up to 50 steps before, and the student came no nearer to
    the teacher."""
    return _changed(
        lines,
        limits.window,
        "rollout/sampled_tokens_per_episode",
        lambda then, now: limits.length_growth is not None and now > limits.length_growth * then,
    )


def _changed(lines: Sequence[Line], window: int, name: str, is_bad: Callable[[float, float], bool]) -> str | None:
    now, kl_now = window_mean(lines, name, window), window_mean(lines, "teacher_kl", window)
    if now is None or kl_now is None or kl_now < ARRIVED:
        return None
    for back in range(window, BEFORE + 1):
        then, kl_then = window_mean(lines, name, window, back), window_mean(lines, "teacher_kl", window, back)
        if then is None or kl_then is None or kl_now < 0.9 * kl_then or not is_bad(then, now):
            continue
        return f"{name} went {then:.3g} -> {now:.3g} in {back} steps, and teacher_kl {kl_then:.3f} -> {kl_now:.3f}"
    return None


def reward_drop(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """The tracked reward's mean over a window is lower than over the best three windows on end of the 50 steps before,
    by more than `reward_drop` and by more than chance: four standard errors of a difference of means within [0, 1]
    (the best of many is high by chance alone)."""
    window, long = limits.window, 3 * limits.window
    now = window_mean(lines, "reward", window)
    earlier = [window_mean(lines, "reward", long, back) for back in range(window, BEFORE + 1)]
    best = max((mean for mean in earlier if mean is not None), default=None)
    episodes = sum(values_of(lines[-window:], "rollout/episodes"))
    if limits.reward_drop is None or now is None or best is None or not episodes:
        return None
    if best - now <= max(limits.reward_drop, 4 * math.sqrt(0.25 / episodes + 0.25 / (3 * episodes))):
        return None
    return f"reward is {now:.3f} over {window} steps; it was {best:.3f} over {long}"


def no_op(lines: Sequence[Line], limits: AlarmsConfig) -> str | None:
    """Nothing is learnt: no gradient, no learning rate, or a student that is its teacher to the last digit."""
    for name, floor, words in (
        ("grad_norm", 0.0, "the gradient is 0"),
        ("lr", 0.0, "the learning rate is 0"),
        ("teacher_kl/k2", SAME, "student and teacher give every token the same probability"),
    ):
        values = values_of(lines[-limits.window :], name)
        if limits.no_op and len(values) == limits.window and max(values) <= floor:
            return f"{words}, for {limits.window} steps"
    return None


RULES: dict[AlarmName, Rule] = {
    "kl_rising": Rule(
        kl_rising,
        "The student leaves its teacher: the steps are too large, or episodes are too old or too far from what the "
        "teacher knows.",
        "Lower optim.lr or rollout.max_turns, and read the worst tokens in the viewer.",
    ),
    "kl_negative": Rule(
        kl_negative,
        "No true KL is: scores of other tokens, of another model or with a wrong sign, or a sampler that cuts its "
        "distribution (rollout.top_p, top_k, temperature).",
        "Run python -m distill.check.",
    ),
    "kl_far": Rule(
        sustained("teacher_kl/above_5", "kl_far", "{:.1%}"),
        "The teacher finds these tokens all but impossible, and the student does not learn to leave them out: another "
        "chat template, thinking tokens, or a closing token that the teacher does not know.",
        "Look at the worst tokens of the run in the viewer: often it is one token id.",
    ),
    "coverage": Rule(
        at_once("teacher/coverage", "coverage", "{:.2%}", below=True),
        "Episodes are dropped because their teacher scores are missing; what is missing is seldom missing at random.",
        "See teacher/dropped/<cause>, and the teacher's log.",
    ),
    "mismatch": Rule(
        at_once("mismatch_kl", "mismatch_kl", "{:.3g}"),
        "The server does not sample from the weights that are trained: old weights, other kernels, or a number format "
        "that loses too much. Runs that go on so tend to collapse.",
        "Run python -m distill.check; take float32 or the same number format for both.",
    ),
    "mismatch_max": Rule(
        sustained("mismatch_kl/max", "mismatch_max", "{:.3g}"),
        "Server and trainer differ widely on single tokens in each step.",
        "Find the tokens in the viewer (mismatch); bfloat16 does it at rare tokens, wrong weights do it anywhere.",
    ),
    "ratio_clipped": Rule(
        sustained("ratio/clipped", "ratio_clipped", "{:.1%}"),
        "Many tokens are trained off their policy, and loss.rho cuts their correction.",
        "Sample with fresher weights, temperature 1 and top_p 1, or lower optim.lr.",
    ),
    "entropy_collapse": Rule(
        entropy_collapse,
        "The student grows sure of what its teacher does not say: the usual beginning of repetition.",
        "Lower optim.lr; read the episodes of the last steps.",
    ),
    "length_growth": Rule(
        length_growth,
        "Episodes grow and do not get better: repetition, or a closing token that is no longer sampled.",
        "Read the longest episodes in the viewer; lower optim.lr or rollout.max_turn_tokens.",
    ),
    "repetition": Rule(
        sustained("rollout/repeated", "repetition", "{:.0%}"),
        "The student says the same again and again within a turn: it has collapsed, or is about to.",
        "Go back to an earlier checkpoint with a lower optim.lr; read the episodes.",
    ),
    "truncated": Rule(
        sustained("rollout/truncated", "truncated", "{:.0%}"),
        "Episodes lose their end to a token budget, so the student never sees how one is finished.",
        "Raise rollout.max_turn_tokens or max_episode_tokens, or give simpler tasks first.",
    ),
    "tool_errors": Rule(
        sustained("tool/error_rate", "tool_errors", "{:.0%}", windows=2),
        "Tools answer with errors: wrong arguments, or a tool that is broken or slow.",
        "See tool_error/<kind>, and the tool results in the viewer.",
    ),
    "invalid_calls": Rule(
        sustained("tool/valid_call_rate", "valid_calls", "{:.0%}", below=True, windows=2),
        "The student writes tool calls that cannot be parsed.",
        "See what the parser said in the viewer; train longer before, or set rollout.on_parse_error.",
    ),
    "reward_drop": Rule(
        reward_drop,
        "The student does its tasks less well than it did, whatever its KL says.",
        "Go back to an earlier checkpoint with a lower optim.lr; look at the failed episodes.",
    ),
    "no_op": Rule(
        no_op,
        "Nothing is learnt: the teacher is the student, the loss is masked, weights are frozen, or by reward alone no "
        "group has two rewards.",
        "Compare student.model with teacher.model, and look at train/tokens, reward/mixed_groups, optim.lr and "
        "loss.teacher_tau.",
    ),
}
"""By name. Order: what makes the numbers wrong, or the run, comes before what is only slow."""
