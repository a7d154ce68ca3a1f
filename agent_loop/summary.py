"""Numbers of many episodes, for people and for programs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agent_loop.types import Episode, TokenTrace
from envs.types import StopReason

MAX_TOOLS_SHOWN = 20
"""A model may invent any number of names."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `--json` prints and `summary.json` holds. None: not computed."""

    model: str
    env: str
    episodes: int
    failed: int
    """Episodes that ended in an error; `episodes.jsonl` says where and why."""
    pass_at: dict[str, float]
    """`pass@1`, `pass@2` ...: chance that one of k episodes of a task succeeds (unbiased); empty without a grader."""
    by_type: dict[str, dict[str, float]]
    """By the tasks' `metadata.question_type`, where there are several, in the order of their `metadata.hops`: `graded`
    episodes, their share of `success`; where tasks say it `hops`, `real` (see `real_success`), and each baseline."""
    real_success: float | None
    """Share of successes among tasks that have an answer: their `metadata.is_na` is false. None where no task says."""
    baselines: dict[str, float]
    """What answers that take no work would reach on these tasks: means of the tasks' `metadata.baselines`."""
    stop_reasons: dict[str, float]
    """Share of all episodes."""
    turns: float | None
    """Mean, like all numbers below, over the episodes that did not fail."""
    tool_calls: float | None
    tool_use: dict[str, float]
    """Calls an episode, by tool; malformed ones, which name no tool for sure, are left out."""
    tool_errors: dict[str, float]
    """Share of all calls, by kind."""
    parse_errors: int
    """Malformed calls, all told."""
    sampled_tokens: float | None
    episode_tokens: float | None
    teacher_kl: float | None
    """Mean over sampled tokens of log p_student - log p_teacher, where a teacher was given."""
    unscored: int | None
    """Episodes that the teacher was asked about and gave no score for."""


def summarise(episodes: Sequence[Episode], *, model: str, env: str, teacher: bool = False) -> Summary:
    """Numbers of many episodes; failed ones count as failures of their task.

    Args:
        teacher: whether one was asked.
    """
    played = [e for e in episodes if e.stop_reason is not StopReason.ERROR]
    results = [r for e in played for t in e.turns for r in t.tool_results]
    errors = Counter(r.error.kind.value for r in results if r.error)
    with_tokens = [e for e in played if e.traces]
    stops = Counter(e.stop_reason.value for e in episodes)
    return Summary(
        model=model,
        env=env,
        episodes=len(episodes),
        failed=len(episodes) - len(played),
        pass_at=pass_at(episodes),
        by_type=by_type(episodes),
        real_success=_success(_real(_graded(episodes))),
        baselines=baselines(episodes),
        stop_reasons={reason: count / len(episodes) for reason, count in stops.most_common()},
        turns=_mean([len(e.turns) for e in played]),
        tool_calls=_mean([sum(len(t.message.tool_calls) for t in e.turns) for e in played]),
        tool_use=_tool_use(played),
        tool_errors={kind: count / len(results) for kind, count in errors.most_common()},
        parse_errors=sum(t.num_parse_errors for e in played for t in e.turns),
        sampled_tokens=_mean([e.num_sampled for e in with_tokens]),
        episode_tokens=_mean([sum(len(t) for t in e.traces) for e in with_tokens]),
        teacher_kl=_mean([gap for e in played for t in e.traces for gap in gaps_of(t) if gap is not None]),
        unscored=sum(e.error is not None for e in played) if teacher else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def gaps_of(trace: TokenTrace) -> list[float | None]:
    """[L] log p_student - log p_teacher of the trained tokens; None elsewhere, and where no teacher scored."""
    if trace.teacher_logprobs is None:
        return [None] * len(trace)
    return [
        student - teacher if trained and student is not None and teacher is not None else None
        for student, teacher, trained in zip(
            trace.sampling_logprobs, trace.teacher_logprobs, trace.loss_mask, strict=True
        )
    ]


def pass_at(episodes: Sequence[Episode]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4 ... and the size of the smallest group.

    1 - C(n - c, k) / C(n, k) with c of a task's n episodes successful, averaged over tasks (Chen et al.,
    arXiv:2107.03374, equation 1). An episode succeeds with a reward of 1; one that failed did not. What played without
    being graded (a task that has no answer) is left out; empty where nothing was graded.
    """
    if all(episode.reward is None for episode in episodes):
        return {}
    groups: dict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        if episode.reward is not None or episode.stop_reason is StopReason.ERROR:
            groups[episode.task.id].append(episode.reward is not None and episode.reward >= 1.0)
    smallest = min(map(len, groups.values()))
    ks = sorted({2**i for i in range(smallest.bit_length())} | {smallest})
    return {f"pass@{k}": fmean(_pass_at(len(g), sum(g), k) for g in groups.values()) for k in ks}


def by_type(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """Success by type of question; empty where there are fewer than two types."""
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in _graded(episodes):
        groups[str(episode.task.metadata.get("question_type"))].append(episode)
    if len(groups) < 2:
        return {}
    order = sorted(groups, key=lambda name: (_hops(groups[name]) or math.inf, name))
    return {name: _numbers(groups[name]) for name in order}


def _numbers(group: Sequence[Episode]) -> dict[str, float]:
    told = {"hops": _hops(group), "success": _success(group), "real": _success(_real(group)), **baselines(group)}
    return {"graded": len(group)} | {name: value for name, value in told.items() if value is not None}


def _hops(group: Sequence[Episode]) -> float | None:
    return _mean([e.task.metadata["hops"] for e in group if type(e.task.metadata.get("hops")) is int])


def _real(episodes: Sequence[Episode]) -> list[Episode]:
    """Those of tasks that say that they have an answer."""
    return [e for e in episodes if e.task.metadata.get("is_na") is False]


def _tool_use(episodes: Sequence[Episode]) -> dict[str, float]:
    calls = Counter(c.name for e in episodes for t in e.turns for c in t.message.tool_calls if c.parse_error is None)
    return {name: count / len(episodes) for name, count in calls.most_common(MAX_TOOLS_SHOWN)}


def baselines(episodes: Sequence[Episode]) -> dict[str, float]:
    """Of the tasks that were played, each once."""
    told: dict[str, dict[str, float]] = defaultdict(dict)
    for episode in episodes:
        said = episode.task.metadata.get("baselines")  # a task file's own: anything may stand there
        for name, right in said.items() if isinstance(said, dict) else ():
            if isinstance(right, int | float):
                told[name][episode.task.id] = float(right)
    return {name: fmean(rights.values()) for name, rights in told.items()}


def _graded(episodes: Sequence[Episode]) -> list[Episode]:
    """Those with a reward, and where any has one those that failed: they did not succeed."""
    if all(episode.reward is None for episode in episodes):
        return []
    return [e for e in episodes if e.reward is not None or e.stop_reason is StopReason.ERROR]


def _success(episodes: Sequence[Episode]) -> float | None:
    return _mean([float(episode.reward is not None and episode.reward >= 1.0) for episode in episodes])


def _pass_at(n: int, c: int, k: int) -> float:
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _type_label(name: str, of: dict[str, float]) -> str:
    return f"  {of['hops']:.0f}: {name}" if "hops" in of else f"  {name}"


def _type_row(of: dict[str, float]) -> str:
    beside = [f"{name} {share:.1%}" for name, share in of.items() if name not in ("graded", "success", "hops")]
    return f"{of['success']:.1%} of {of['graded']:.0f}" + (f" ({', '.join(beside)})" if beside else "")


def table(summary: Summary) -> str:
    """The summary for a person."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    rows = [("model", summary.model), ("environment", summary.env)]
    rows.append(("episodes", f"{summary.episodes} ({summary.failed} failed)"))
    rows += [(name, f"{value:.1%}") for name, value in summary.pass_at.items()] or [("success", "not graded")]
    rows += [(_type_label(name, of), _type_row(of)) for name, of in summary.by_type.items()]
    if summary.real_success is not None:
        rows.append(("success where there is an answer", f"{summary.real_success:.1%}"))
    rows += [(f"without any work: {name}", f"{share:.1%}") for name, share in summary.baselines.items()]
    rows += [
        ("turns", number(summary.turns, "{:.2f}")),
        ("tool calls", number(summary.tool_calls, "{:.2f}")),
        *((f"  {name}", f"{count:.2f}") for name, count in summary.tool_use.items()),
        ("malformed calls", str(summary.parse_errors)),
        ("sampled tokens", number(summary.sampled_tokens, "{:.1f}")),
        ("episode tokens", number(summary.episode_tokens, "{:.1f}")),
    ]
    if summary.unscored is not None:
        lost = f" ({summary.unscored} episodes without a score)" if summary.unscored else ""
        rows.append(("teacher_kl", number(summary.teacher_kl, "{:.4f} nats a token") + lost))
    rows += [(f"stopped: {reason}", f"{share:.1%}") for reason, share in summary.stop_reasons.items()]
    rows += [(f"tool error: {kind}", f"{share:.1%} of calls") for kind, share in summary.tool_errors.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
