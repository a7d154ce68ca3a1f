"""Rows of the loss from traces."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import make_episode, make_episodes

from agent_loop.types import TokenClass
from distill.batch import TrainItem, collate, group_advantages, items_of, split_micro_batches
from distill.types import Batch

both = pytest.mark.parametrize("packed", [True, False])


def traces_in(batch: Batch) -> list[list[int]]:
    """The inputs of each trace, in order, checked against what lies around them."""
    lengths = batch.lengths_B.tolist()
    if batch.boundaries is None:
        for row, length in zip(batch.input_ids_BT, lengths, strict=True):
            assert not row[length:].any()
        return [row[:length].tolist() for row, length in zip(batch.input_ids_BT, lengths, strict=True)]
    assert batch.boundaries.tolist() == [0, *itertools.accumulate(lengths)]
    (row,) = batch.input_ids_BT
    assert len(row) == sum(lengths)
    return [part.tolist() for part in row.split(lengths)]


def place_of(batch: Batch, n: int) -> tuple[int, int]:
    """Trace of row n, and the position in it."""
    if batch.boundaries is None:
        return int(batch.seq_N[n]), int(batch.pos_N[n])
    assert batch.seq_N[n] == 0
    trace = int(torch.searchsorted(batch.boundaries, batch.pos_N[n], right=True)) - 1
    return trace, int(batch.pos_N[n] - batch.boundaries[trace])


@both
def test_every_trained_token_has_the_row_that_predicts_it(packed: bool) -> None:
    episodes = make_episodes(7, top_k=3)
    items = items_of(episodes, [float(i) for i in range(7)])
    batch = collate(items, packed=packed)
    n = 0
    for b, item in enumerate(items):
        trace = item.trace
        assert trace.teacher_logprobs is not None
        assert trace.teacher_topk is not None
        for i, trained in enumerate(trace.loss_mask):
            if not trained:
                continue
            assert place_of(batch, n) == (b, i - 1)
            assert int(batch.targets_N[n]) == trace.token_ids[i]
            assert int(batch.input_ids_BT[batch.seq_N[n], batch.pos_N[n]]) == trace.token_ids[i - 1]
            assert float(batch.sampling_logprobs_N[n]) == pytest.approx(trace.sampling_logprobs[i])
            assert float(batch.teacher_logprobs_N[n]) == pytest.approx(trace.teacher_logprobs[i])
            assert batch.topk_ids_NK is not None
            assert batch.topk_ids_NK[n].tolist() == trace.teacher_topk.token_ids[i]
            segment = next(s for s in trace.segments if s.start <= i < s.end)
            assert int(batch.turns_N[n]) == segment.turn
            first = (TokenClass.THINK, TokenClass.CALL)[segment.turn]
            token_class = first if i == segment.start else TokenClass.ANSWER
            assert tuple(TokenClass)[int(batch.classes_N[n])] is token_class
            assert int(batch.episodes_N[n]) == item.episode_index == float(batch.advantages_N[n])
            n += 1
    assert n == batch.num_trained == sum(i.trace.num_trained for i in items)
    assert traces_in(batch) == [item.trace.token_ids[: item.num_inputs] for item in items]


@both
def test_micro_batches_hold_every_trace_once_within_the_budget(packed: bool) -> None:
    items = items_of(make_episodes(40))
    groups = split_micro_batches(items, 100, packed=packed)
    assert len(groups) > 1
    assert sorted(i.episode_index for g in groups for i in g) == list(range(40))
    for group in groups:
        assert len(group) == 1 or collate(group, packed=packed).input_ids_BT.numel() <= 100
    assert [len(g) for g in split_micro_batches(items, 1, packed=packed)] == [1] * 40
    assert len(split_micro_batches(items, 10**9, packed=packed)) == 1
    assert split_micro_batches([], 100, packed=packed) == []


def test_packed_micro_batches_are_full() -> None:
    """First fit: of any two groups, the second's shortest trace did not fit into the first. And so fewer passes."""
    items = items_of(make_episodes(60))
    groups = split_micro_batches(items, 120, packed=True)
    tokens = [sum(i.num_inputs for i in group) for group in groups]
    for earlier, later in itertools.combinations(range(len(groups)), 2):
        assert tokens[earlier] + min(i.num_inputs for i in groups[later]) > 120
    assert len(groups) < len(split_micro_batches(items, 120, packed=False))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 8),
    max_tokens=st.integers(1, 400),
    junk=st.floats(-99, 0),
    packed=st.booleans(),
)
def test_rows_do_not_depend_on_packing_or_on_masked_values(
    seed: int, count: int, max_tokens: int, junk: float, packed: bool
) -> None:
    """Whatever the order, the split, the form and the numbers at masked positions: the same rows."""
    episodes = make_episodes(count, seed=seed, top_k=2)

    def rows_of(groups: list[list[TrainItem]], packed: bool) -> list[tuple[float, ...]]:
        found = []
        for group in groups:
            batch = collate(group, packed=packed)
            traces = traces_in(batch)
            assert batch.topk_ids_NK is not None
            for n in range(batch.num_trained):
                trace, position = place_of(batch, n)
                context = traces[trace][: position + 1]
                per_row = (batch.episodes_N, batch.targets_N, batch.turns_N, batch.classes_N)
                scores = (batch.sampling_logprobs_N, batch.teacher_logprobs_N)
                head = batch.topk_ids_NK[n].tolist()
                found.append((position, *(float(values[n]) for values in (*per_row, *scores)), *head, *context))
        return sorted(found)

    wanted = rows_of([items_of(episodes)], packed=False)
    items = items_of(episodes)
    random.Random(seed).shuffle(items)
    for item in items:
        trace = item.trace
        assert trace.teacher_logprobs is not None
        for i, trained in enumerate(trace.loss_mask):
            if not trained:
                trace.teacher_logprobs[i] = trace.sampling_logprobs[i] = junk
    assert rows_of(split_micro_batches(items, max_tokens, packed=packed), packed) == wanted


def test_traces_without_a_trained_token_are_left_out() -> None:
    episodes = make_episodes(2)
    episodes[0].traces[0].loss_mask = [False] * len(episodes[0].traces[0])
    assert [i.episode_index for i in items_of(episodes)] == [1]
    with pytest.raises(ValueError, match="no traces"):
        collate([], packed=True)


@pytest.mark.parametrize("name", ["teacher", "sampling"])
def test_a_missing_score_is_refused_never_zero(name: str) -> None:
    episode = make_episode(3, rng=random.Random(0))
    trace = episode.traces[0]
    i = trace.loss_mask.index(True)
    getattr(trace, f"{name}_logprobs")[i] = None
    with pytest.raises(ValueError, match=rf"1/task3/0.*token {i} .* no {name} log-probability \(1 of"):
        collate(items_of([episode]), packed=True)


def test_an_unscored_trace_and_a_trained_first_token_are_refused() -> None:
    episode = make_episode(0, rng=random.Random(0))
    episode.traces[0].teacher_logprobs = None
    with pytest.raises(ValueError, match="has not scored"):
        collate(items_of([episode]), packed=True)
    episode = make_episode(0, rng=random.Random(0))
    episode.traces[0].loss_mask[0] = True
    with pytest.raises(ValueError, match="nothing predicts it"):
        collate(items_of([episode]), packed=True)


def test_ragged_missing_or_doubled_candidates_are_refused() -> None:
    for change in ("missing", "ragged", "doubled", "none"):
        episodes = make_episodes(2, top_k=3)
        topk = episodes[1].traces[0].teacher_topk
        assert topk is not None
        i = episodes[1].traces[0].loss_mask.index(True)
        ids = topk.token_ids[i]
        assert ids is not None
        if change == "missing":
            topk.token_ids[i] = None
        elif change == "ragged":
            ids.pop()
        elif change == "doubled":
            ids[0] = ids[1]
        else:
            episodes[1].traces[0].teacher_topk = None
        with pytest.raises(ValueError, match=r"task1.*candidates"):
            collate(items_of(episodes), packed=True)


def test_advantages_are_centred_in_their_group() -> None:
    episodes = make_episodes(4)
    for episode, task, reward in zip(episodes, "aabb", (1.0, 0.0, 1.0, 1.0), strict=True):
        episode.task = type(episode.task)(messages=episode.task.messages, id=task)
        episode.reward = reward
    assert group_advantages(episodes) == [0.5, -0.5, 0.0, 0.0]
    episodes[2].reward = None
    with pytest.raises(ValueError, match=r"task2.*skip_verification"):
        group_advantages(episodes)


def test_collation_is_in_the_order_of_its_items() -> None:
    items = items_of(make_episodes(5))
    forward, backward = collate(items, packed=True), collate(items[::-1], packed=True)
    assert torch.equal(forward.lengths_B, backward.lengths_B.flip(0))
    assert sorted(forward.targets_N.tolist()) == sorted(backward.targets_N.tolist())
