"""From scored episodes to tensors. `collate` is the only place that shifts by one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal

import numpy as np
import torch

from agent_loop.types import Episode, SegmentSource, TokenClass, TokenTrace
from distill.types import Batch

CLASS_INDEX = {token_class: i for i, token_class in enumerate(TokenClass)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainItem:
    """One trace of a step."""

    episode_index: int
    """Of the episode in the step."""
    episode: Episode
    trace_index: int
    advantage: float = 0.0
    """Of the episode; multiplied by `adv_tau`."""
    turn_balance: float = 0.0
    """`loss.turn_balance`."""
    mean_turn: float = 1.0
    """Trained tokens of a turn, mean over the turns of the step that have any; read with `turn_balance` alone."""
    source_weight: float = 1.0
    """Of each trained token, on top of its turn's weight; other than 1 with `loss.source_balance` alone."""

    @property
    def trace(self) -> TokenTrace:
        return self.episode.traces[self.trace_index]

    @property
    def num_inputs(self) -> int:
        """Tokens to feed: those before the last trained one. What follows it cannot change a trained row."""
        mask = self.trace.loss_mask
        return len(mask) - 1 - mask[::-1].index(True) if True in mask else 0

    @property
    def where(self) -> str:
        return f"episode {self.episode.id!r}, trace {self.trace_index}"


def items_of(
    episodes: Sequence[Episode],
    advantages: Sequence[float] | None = None,
    *,
    turn_balance: float = 0.0,
    source_balance: float = 0.0,
    shares: Mapping[str, float] | None = None,
) -> list[TrainItem]:
    """The traces that have something to train on, in order.

    Args:
        advantages: one an episode; zeros if not given.
        turn_balance, source_balance: of `LossConfig`.
        shares: by source, relative to one another; needed with `source_balance`.
    """
    trained = [
        (i, k) for i, episode in enumerate(episodes) for k, trace in enumerate(episode.traces) if any(trace.loss_mask)
    ]
    counts = [c for i, k in trained if turn_balance for c in _tokens_by_turn(episodes[i].traces[k]).values()]
    items = [
        TrainItem(
            episode_index=i,
            episode=episodes[i],
            trace_index=k,
            advantage=0.0 if advantages is None else advantages[i],
            turn_balance=turn_balance,
            mean_turn=sum(counts) / len(counts) if counts else 1.0,
        )
        for i, k in trained
    ]
    if not source_balance or shares is None:
        return items
    weights = source_weights(items, shares, source_balance)
    return [replace(item, source_weight=weights[item.episode.task.source]) for item in items]


def source_weights(items: Sequence[TrainItem], shares: Mapping[str, float], balance: float) -> dict[str, float]:
    """What a trained token of each source of a step weighs, so that with `balance` = 1 the source's tokens together
    weigh as its share among the sources that are there, and in any case all tokens together as many as they are.

    Token-balanced weights of several teachers: Open-MOPD, arXiv 2608.19098.
    """
    weights: dict[str, float] = defaultdict(float)
    for item in items:
        turns = _tokens_by_turn(item.trace)
        # Turn-balanced, each turn has the weight of one of mean length, whatever it has of tokens.
        balanced = len(turns) * item.mean_turn - turns.total()
        weights[item.episode.task.source] += turns.total() + item.turn_balance * balanced
    whole, total_share = sum(weights.values()), sum(shares[source] for source in weights)
    return {
        source: 1 + balance * (shares[source] / total_share * whole / weight - 1) for source, weight in weights.items()
    }


def _tokens_by_turn(trace: TokenTrace) -> Counter[int]:
    """Trained tokens of each turn that has any."""
    counts: Counter[int] = Counter()
    for segment in trace.segments:
        if segment.source is SegmentSource.ASSISTANT and (count := sum(trace.loss_mask[segment.start : segment.end])):
            counts[segment.turn] += count
    return counts


def group_advantages(episodes: Sequence[Episode], norm: Literal["mean", "std"] = "mean") -> list[float]:
    """Reward minus the mean reward of the task's episodes in this step.

    Args:
        norm: `mean`: that. `std`: over the group's standard deviation (GRPO, arXiv 2402.03300, equation 3 ff.), which
            weighs tasks by how sure the student is (Dr. GRPO, arXiv 2503.20783); 0 in a group of equal rewards.

    Raises:
        ValueError: an episode without a reward.
    """
    groups: dict[str, list[float]] = {}
    for episode in episodes:
        if episode.reward is None:
            raise ValueError(
                f"episode {episode.id!r} has no reward, but loss.adv_tau is not 0; set skip_verification = false"
            )
        groups.setdefault(episode.task.id, []).append(episode.reward)
    means = {task: fmean(rewards) for task, rewards in groups.items()}
    scales = {task: pstdev(rewards) if norm == "std" else 1.0 for task, rewards in groups.items()}
    return [
        ((e.reward or 0.0) - means[e.task.id]) / scales[e.task.id] if scales[e.task.id] > 1e-6 else 0.0
        for e in episodes
    ]


def split_micro_batches(items: Sequence[TrainItem], max_tokens: int, *, packed: bool) -> list[list[TrainItem]]:
    """Group traces so that a forward pass has at most `max_tokens` inputs, padding included; a longer trace goes alone.

    The split changes speed and memory, no result: the denominator of the loss is the whole step's.

    Args:
        packed: traces lie end to end, so a group takes what fits (longest first, into the first group with room);
            else each takes as much as the longest, so groups are of like length.
    """
    groups: list[list[TrainItem]] = []
    tokens: list[int] = []
    for length, item in sorted(((item.num_inputs, item) for item in items), key=lambda pair: -pair[0]):
        for i in range(0 if packed else max(0, len(groups) - 1), len(groups)):
            more = length if packed else groups[i][0].num_inputs
            if tokens[i] + more <= max_tokens:
                groups[i].append(item)
                tokens[i] += more
                break
        else:
            groups.append([item])
            tokens.append(length)
    return groups


@dataclass(slots=True)
class _Rows:
    """The trained rows of one trace, as arrays over its [n] trained tokens."""

    input_ids: np.ndarray
    """[T] inputs of this trace."""
    positions: np.ndarray
    """[n] positions of the trained tokens themselves."""
    targets: np.ndarray
    sampling: np.ndarray
    teacher: np.ndarray
    turns: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    """1, or with `turn_balance` more in turns of few tokens, with `source_balance` in sources of few."""


def collate(items: Sequence[TrainItem], *, packed: bool, scored: bool = True) -> Batch:
    """Lay traces end to end (`packed`) or pad them on the right, and gather their trained rows, trace by trace in
    order.

    Args:
        scored: False for supervised training, which reads no scores: they are NaN, whatever the traces hold.

    Raises:
        ValueError: no items; a trained token without a teacher or sampling score, at position 0, or, where one trace
            has teacher candidates, without K of them.
    """
    if not items:
        raise ValueError("collate: no traces")
    rows = [_rows_of(item, scored=scored) for item in items]
    lengths = np.array([len(row.input_ids) for row in rows])
    counts = [len(row.positions) for row in rows]
    if packed:
        inputs = np.concatenate([row.input_ids for row in rows])[None]
        sequences = np.zeros(len(rows), dtype=np.int64)
        offsets = lengths.cumsum() - lengths
    else:
        inputs = np.zeros((len(rows), max(lengths)), dtype=np.int64)
        for i, row in enumerate(rows):
            inputs[i, : lengths[i]] = row.input_ids
        sequences = np.arange(len(rows))
        offsets = np.zeros(len(rows), dtype=np.int64)

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))

    topk_ids, topk_logprobs = _topk_of(items, rows) if scored else (None, None)
    return Batch(
        input_ids_BT=torch.from_numpy(inputs),
        boundaries=torch.from_numpy(np.append(0, lengths.cumsum())) if packed else None,
        lengths_B=torch.from_numpy(lengths),
        seq_N=torch.from_numpy(np.repeat(sequences, counts)),
        pos_N=joined("positions") - 1 + torch.from_numpy(np.repeat(offsets, counts)),  # token i is predicted at i - 1
        targets_N=joined("targets"),
        sampling_logprobs_N=joined("sampling"),
        teacher_logprobs_N=joined("teacher"),
        advantages_N=torch.from_numpy(np.repeat(np.array([i.advantage for i in items], dtype=np.float32), counts)),
        weights_N=joined("weights"),
        turns_N=joined("turns"),
        classes_N=joined("classes"),
        episodes_N=torch.from_numpy(np.repeat(np.array([i.episode_index for i in items], dtype=np.int64), counts)),
        topk_ids_NK=topk_ids,
        topk_logprobs_NK=topk_logprobs,
    )


def _rows_of(item: TrainItem, *, scored: bool) -> _Rows:
    trace = item.trace
    ids = np.array(trace.token_ids, dtype=np.int64)
    positions = np.flatnonzero(np.array(trace.loss_mask, dtype=bool))
    if not len(positions):
        raise ValueError(f"{item.where}: no token is trained")
    if positions[0] == 0:
        raise ValueError(f"{item.where}: token 0 is to be trained on, but nothing predicts it")
    scores = _scores_of(item, positions) if scored else dict.fromkeys(("teacher", "sampling"), _unscored(positions))
    turns = np.zeros(len(ids), dtype=np.int64)
    for segment in trace.segments:
        if segment.source is SegmentSource.ASSISTANT:
            turns[segment.start : segment.end] = segment.turn
    classes = np.full(len(ids), CLASS_INDEX[TokenClass.ANSWER], dtype=np.int64)
    for turn in item.episode.turns:
        if turn.trace == item.trace_index and turn.start is not None:
            for span in turn.token_classes:
                classes[turn.start + span.start : turn.start + span.end] = CLASS_INDEX[span.token_class]
    turns = turns[positions]
    weights = np.ones(len(positions), dtype=np.float32)
    if item.turn_balance:
        # Turn-balanced, every turn has the weight of one of mean length: over the step, weights sum to the tokens.
        by_turn = {turn: item.mean_turn / count for turn, count in _tokens_by_turn(trace).items()}
        balanced = np.array([by_turn[turn] for turn in turns.tolist()], dtype=np.float32)
        weights += item.turn_balance * (balanced - weights)
    weights *= np.float32(item.source_weight)
    return _Rows(
        input_ids=ids[: positions[-1]],
        positions=positions,
        targets=ids[positions],
        sampling=scores["sampling"],
        teacher=scores["teacher"],
        turns=turns,
        classes=classes[positions],
        weights=weights,
    )


def _scores_of(item: TrainItem, positions: np.ndarray) -> dict[str, np.ndarray]:
    """[n] log-probabilities by the teacher and at sampling."""
    trace = item.trace
    if trace.teacher_logprobs is None:
        raise ValueError(f"{item.where}: the teacher has not scored it")
    scores = {}
    for name, values in (("teacher", trace.teacher_logprobs), ("sampling", trace.sampling_logprobs)):
        scores[name] = np.array(values, dtype=np.float32)[positions]  # None becomes nan
        missing = np.flatnonzero(np.isnan(scores[name]))
        if len(missing):
            raise ValueError(
                f"{item.where}: token {positions[missing[0]]} is to be trained on but has no {name} log-probability "
                f"({len(missing)} of {len(positions)} tokens)"
            )
    return scores


def _unscored(positions: np.ndarray) -> np.ndarray:
    return np.full(len(positions), np.nan, dtype=np.float32)


def _topk_of(items: Sequence[TrainItem], rows: Sequence[_Rows]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """[N, K] ids and log-probabilities; None where no trace has candidates."""
    if all(item.trace.teacher_topk is None for item in items):
        return None, None
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for item, row in zip(items, rows, strict=True):
        topk = item.trace.teacher_topk
        for i in row.positions.tolist():
            ids_K = topk.token_ids[i] if topk is not None else None
            logprobs_K = topk.logprobs[i] if topk is not None else None
            wanted = len(ids[0]) if ids else len(ids_K or ())
            if ids_K is None or logprobs_K is None or not len(ids_K) == len(logprobs_K) == wanted:
                raise ValueError(
                    f"{item.where}: token {i} has {len(ids_K or ())} teacher candidates with {len(logprobs_K or ())} "
                    f"log-probabilities; other tokens have {wanted}"
                )
            if len(set(ids_K)) != wanted:
                raise ValueError(f"{item.where}: the teacher's candidates for token {i} name one id twice")
            ids.append(ids_K)
            logprobs.append(logprobs_K)
    shape = (len(ids), len(ids[0]))
    return (
        torch.from_numpy(np.array(ids, dtype=np.int64).reshape(shape)),
        torch.from_numpy(np.array(logprobs, dtype=np.float32).reshape(shape)),
    )
