"""What a step's episodes tell, as flat numbers. Names and meanings: docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from agent_loop.types import Episode
from envs.types import StopReason

Metrics = dict[str, float | int | None]

CUT_SHORT = (StopReason.MAX_TURN_TOKENS, StopReason.MAX_TOKENS, StopReason.CONTEXT_OVERFLOW)
"""Stop reasons of an episode that lost its end to a token budget."""


def mean(values: Sequence[float]) -> float | None:
    """None of no values: not computed."""
    return fmean(values) if values else None


REPEATED = 4
"""Tokens of a sequence that counts as repeated where the same turn has it twice."""


def repeated_share(token_ids: Sequence[int]) -> float | None:
    """Share of a turn's sequences of `REPEATED` tokens that stood in it before. None of a turn too short to tell."""
    ids = np.asarray(token_ids, dtype=np.uint64)
    count = len(ids) - REPEATED + 1
    if count < REPEATED:
        return None
    hashed = np.zeros(count, dtype=np.uint64)
    for offset in range(REPEATED):  # a polynomial modulo 2^64: two sequences share a value once in 10^19
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count] + np.uint64(1)
    return 1 - len(np.unique(hashed)) / count


def rollout_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Numbers of the rollouts of one step. Failed episodes count in `rollout/*` shares, not in lengths."""
    count = len(episodes)
    played = [e for e in episodes if e.stop_reason is not StopReason.ERROR]
    turns = [turn for e in played for turn in e.turns]
    calls = [call for turn in turns for call in turn.message.tool_calls]
    results = [result for turn in turns for result in turn.tool_results]
    errors = Counter(result.error.kind.value for result in results if result.error)
    stops = Counter(e.stop_reason.value for e in episodes)
    sampled = [e.num_sampled for e in played]
    spans = [(e.traces[t.trace].token_ids, t) for e in played for t in e.turns if t.trace is not None]
    repeated = [repeated_share(ids[turn.start : turn.end]) for ids, turn in spans]
    metrics: Metrics = {
        "rollout/episodes": count,
        "rollout/failed": count - len(played),
        "rollout/num_turns": mean([len(e.turns) for e in played]),
        "rollout/sampled_tokens": sum(sampled),
        "rollout/sampled_tokens_per_episode": mean(sampled),
        "rollout/tokens_per_episode": mean([sum(len(t) for t in e.traces) for e in played]),
        "rollout/truncated": sum(e.stop_reason in CUT_SHORT for e in episodes) / count if count else None,
        "rollout/repeated": mean([share for share in repeated if share is not None]),
        "rollout/extra_traces": sum(max(0, len(e.traces) - 1) for e in played),
        "rollout/parse_errors": sum(turn.num_parse_errors for turn in turns),
        "tool/calls_per_episode": len(calls) / len(played) if played else None,
        "tool/error_rate": sum(errors.values()) / len(results) if results else None,
        "tool/valid_call_rate": sum(c.parse_error is None for c in calls) / len(calls) if calls else None,
    }
    metrics |= {f"stop_reason/{reason}": n / count for reason, n in sorted(stops.items())}
    metrics |= {f"tool_error/{kind}": n / len(results) for kind, n in sorted(errors.items())}
    metrics |= reward_metrics(episodes)
    return metrics


def reward_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Tracked rewards by name, of several sources also by source; nothing where verification was skipped."""
    names = sorted({name for e in episodes for name in e.rewards})
    metrics: Metrics = {
        f"reward/{name}": mean([e.rewards[name] for e in episodes if name in e.rewards]) for name in names
    }
    if any(e.reward is not None for e in episodes):
        # An episode that failed did not succeed: it counts in the denominator.
        metrics["reward"] = sum(e.reward or 0.0 for e in episodes) / len(episodes)
    groups: dict[str, list[float]] = {}
    for e in episodes:
        if e.reward is not None:
            groups.setdefault(e.task.id, []).append(e.reward)
    mixed = [len(set(rewards)) > 1 for rewards in groups.values() if len(rewards) > 1]
    if mixed:
        metrics["reward/mixed_groups"] = mean(mixed)
    sources = sorted({e.task.source for e in episodes})
    if len(sources) > 1:
        for source in sources:
            of_source = reward_metrics([e for e in episodes if e.task.source == source])
            metrics |= {
                f"reward/{source}/{name.removeprefix('reward/')}": value
                for name, value in of_source.items()
                if name != "reward"
            }
    return metrics
