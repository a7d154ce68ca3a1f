"""The mask builder: arrays, segments and masks grow together or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop.trace import TraceBuilder
from agent_loop.types import Completion, SegmentSource, TopK


def completion(*ids: int, logprob: float = -0.5) -> Completion:
    return Completion(token_ids=ids, logprobs=tuple(logprob for _ in ids), finish_reason="stop", policy_version=0)


def test_an_episode_of_two_turns() -> None:
    builder = TraceBuilder([1, 2])
    assert builder.add_completion(completion(3, 4), turn=0) == (2, 4)
    builder.extend([5], [6, 7], turn=0)
    assert builder.prompt_ids == [1, 2, 3, 4, 5, 6, 7]
    assert builder.add_completion(completion(8), turn=1) == (7, 8)
    (trace,) = builder.traces()
    assert [(s.start, s.end, s.source.value, s.turn) for s in trace.segments] == [
        (0, 2, "prompt", -1),
        (2, 4, "assistant", 0),
        (4, 5, "glue", 0),
        (5, 7, "tool", 0),
        (7, 8, "assistant", 1),
    ]
    assert trace.loss_mask == [False, False, True, True, False, False, False, True]
    assert [p is not None for p in trace.sampling_logprobs] == trace.loss_mask


def test_a_turn_that_is_not_trained_on_keeps_its_log_probabilities() -> None:
    builder = TraceBuilder([1])
    builder.add_completion(completion(2, 3), turn=0, trainable=False)
    builder.extend([], [4], turn=0)
    builder.add_completion(completion(5), turn=1)
    (trace,) = builder.traces()
    assert trace.loss_mask == [False, False, False, False, True]
    assert trace.sampling_logprobs == [None, -0.5, -0.5, None, -0.5]
    builder.mask_turn(1)
    assert not any(builder.traces()[0].loss_mask)


def test_a_fork_opens_a_trace_of_its_own() -> None:
    builder = TraceBuilder([1])
    builder.add_completion(completion(2), turn=0)
    assert builder.index == 0
    builder.fork([1, 9])
    assert builder.index == 1
    assert builder.prompt_ids == [1, 9]
    builder.add_completion(completion(3), turn=1)
    assert [trace.token_ids for trace in builder.traces()] == [[1, 2], [1, 9, 3]]
    assert len(builder.traces()) == 2, "reading the traces changes nothing"


def test_versions_and_candidates_lie_on_the_sampled_tokens() -> None:
    builder = TraceBuilder([1])
    turn = completion(2, 3)
    builder.add_completion(replace(turn, token_versions=(4, 5), topk=(((2, -0.5), (9, -1.0)),) * 2), turn=0)
    builder.extend([6], [7], turn=0)
    builder.add_completion(replace(completion(8), policy_version=None), turn=1)
    (trace,) = builder.traces()
    assert trace.policy_versions == [None, 4, 5, None, None, None]
    assert trace.sampling_topk is not None
    assert trace.sampling_topk.token_ids == [None, [2, 9], [2, 9], None, None, None]
    assert trace.sampling_topk.logprobs == [None, [-0.5, -1.0], [-0.5, -1.0], None, None, None]


def test_versions_that_nobody_said_are_none_as_a_whole() -> None:
    builder = TraceBuilder([1])
    builder.add_completion(replace(completion(2), policy_version=None), turn=0)
    (trace,) = builder.traces()
    assert (trace.policy_versions, trace.sampling_topk) == (None, None)


@pytest.mark.parametrize("name", ["policy_versions", "sampling_topk"])
def test_arrays_of_another_length_are_refused(name: str) -> None:
    builder = TraceBuilder([1])
    builder.add_completion(completion(2), turn=0)
    (trace,) = builder.traces()
    setattr(trace, name, [3] if name == "policy_versions" else TopK(token_ids=[[1]], logprobs=[None, [-1.0]]))
    with pytest.raises(ValueError, match=f"{name}.* has 1 entries for 2 tokens"):
        trace.check()


def test_what_comes_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        TraceBuilder([])
    builder = TraceBuilder([1])
    with pytest.raises(ValueError, match="nothing was sampled"):
        builder.extend([2], [3], turn=0)
    builder.add_completion(completion(2), turn=0)
    with pytest.raises(ValueError, match="answered already"):
        builder.add_completion(completion(3), turn=1)


def test_a_completion_without_a_token_leaves_no_segment() -> None:
    builder = TraceBuilder([1])
    assert builder.add_completion(completion(), turn=0) == (1, 1)
    builder.extend([2], [3], turn=0)
    builder.add_completion(completion(4), turn=1)
    sources = [s.source for s in builder.traces()[0].segments]
    assert sources == [SegmentSource.PROMPT, SegmentSource.GLUE, SegmentSource.TOOL, SegmentSource.ASSISTANT]


IDS = st.lists(st.integers(0, 99), max_size=5)


@given(st.lists(IDS, min_size=1, max_size=1), st.lists(st.tuples(IDS, IDS, IDS, st.booleans()), max_size=5))
def test_any_episode_is_tiled_by_its_segments(prompt: list[list[int]], turns: list[tuple[list[int], ...]]) -> None:
    builder = TraceBuilder([7, *prompt[0]])
    expected: list[int] = [7, *prompt[0]]
    sampled = 0
    for turn, (ids, glue, tool, trainable) in enumerate(turns):
        start, end = builder.add_completion(completion(*ids), turn=turn, trainable=bool(trainable))
        expected += ids
        assert builder.prompt_ids == expected
        assert builder.prompt_ids[start:end] == ids
        sampled += len(ids) if trainable else 0
        builder.extend(glue, tool, turn=turn)
        expected += [*glue, *tool]
    (trace,) = builder.traces()
    trace.check()
    assert trace.token_ids == expected
    assert trace.num_trained == sampled
