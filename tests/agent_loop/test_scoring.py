"""Scores of given tokens: looked up by id, and never a number that is not one."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agent_loop.scoring import ScoringError, prompt_logprobs, read_scores
from agent_loop.transport import HttpTransport
from tests.fakes.fake_vllm import FakeVllm

IDS = [3, 14, 15, 9, 26, 5, 35]


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with FakeVllm("teacher", 64) as server:
        yield server


@pytest.fixture
async def transport(server: FakeVllm) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(server.base_url, retry_deadline_s=0.2)
    yield transport
    await transport.aclose()


def row(**logprobs: float | None) -> dict[str, Any]:
    return {key[1:]: {"logprob": value, "rank": 1, "decoded_token": None} for key, value in logprobs.items()}


async def test_each_token_has_its_own_number(server: FakeVllm, transport: HttpTransport) -> None:
    scores = await prompt_logprobs(transport, "teacher", IDS, top_k=0, timeout_s=5.0)
    states = server.invented.states(IDS)
    expected = [server.invented.logprob(states[i], IDS[i]) for i in range(1, len(IDS))]
    assert scores.logprobs == [None, *expected]
    assert scores.topk is None
    assert server.received[-1].payload["max_tokens"] == 1


async def test_the_best_candidates_whether_the_token_is_among_them_or_not(
    server: FakeVllm, transport: HttpTransport
) -> None:
    states = server.invented.states(IDS)
    likely = server.invented.at_rank(states[-1], 1)
    unlikely = server.invented.at_rank(server.invented.states([*IDS, likely])[-1], 60)
    ids = [*IDS, likely, unlikely]
    scores = await prompt_logprobs(transport, "teacher", ids, top_k=3, timeout_s=5.0)
    assert scores.topk is not None
    assert scores.topk[0] is None
    for position, state in enumerate(server.invented.states(ids)[1:-1], start=1):
        best = [server.invented.at_rank(state, rank) for rank in range(3)]
        assert scores.topk[position] == [(i, server.invented.logprob(state, i)) for i in best]
    assert likely in [i for i, _ in scores.topk[-2] or ()]
    assert unlikely not in [i for i, _ in scores.topk[-1] or ()]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("minus_9999", "not_finite", r"token 1 \(id 14\) is -9999.0"),
        ("nan", "not_finite", "is nan"),
        ("null", "protocol", "is None, not a number"),
        ("short", "protocol", "6 scores came back for 7 tokens"),
        ("wrong_ids", "protocol", r"no score for token 1 \(id 14\)"),
        ("truncated_json", "protocol", "no JSON"),
        ("html", "protocol", "no JSON"),
        ("http_500", "unavailable", r"127\.0\.0\.1.*answered 500"),
        ("http_429", "unavailable", "answered 429"),
        ("stall", "unavailable", "did not answer"),
    ],
)
@pytest.mark.parametrize("top_k", [0, 2])
async def test_rubbish_is_a_typed_error(
    server: FakeVllm, transport: HttpTransport, fault: str, kind: str, message: str, top_k: int
) -> None:
    server.fault_after(1, fault, only_scoring=True)
    await prompt_logprobs(transport, "teacher", IDS, top_k=top_k, timeout_s=5.0)
    if fault == "wrong_ids" and top_k:
        message = "no score for token"  # the shifted ids may hit a token by chance
    with pytest.raises(ScoringError, match=message) as caught:
        await prompt_logprobs(transport, "teacher", IDS, top_k=top_k, timeout_s=0.5)
    assert caught.value.kind == kind


async def test_too_long_and_unknown_model(transport: HttpTransport) -> None:
    with pytest.raises(ScoringError, match="maximum context length") as caught:
        await prompt_logprobs(transport, "teacher", [1] * 4096, top_k=0, timeout_s=5.0)
    assert caught.value.kind == "context_overflow"
    with pytest.raises(ScoringError, match="does not exist") as caught:
        await prompt_logprobs(transport, "someone", IDS, top_k=0, timeout_s=5.0)
    assert caught.value.kind == "rejected"


async def test_a_server_that_cannot_score_says_so() -> None:
    with FakeVllm("m", 64, scores=False) as server:
        transport = HttpTransport(server.base_url)
        with pytest.raises(ScoringError, match="ignored prompt_logprobs"):
            await prompt_logprobs(transport, "m", IDS, top_k=0, timeout_s=5.0)
        await transport.aclose()


def test_the_first_entry_is_not_taken_for_the_token() -> None:
    scores = read_scores([None, row(t8=-0.5, t7=-2.0)], [1, 7], 1)
    assert scores.logprobs == [None, -2.0]
    assert scores.topk == [None, [(8, -0.5)]]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.1, -9999.0, -1e9, 10**400, True, "-1.0", [], {}])
def test_what_is_no_log_probability(value: Any) -> None:
    with pytest.raises(ScoringError):
        read_scores([None, {"7": {"logprob": value}}], [1, 7], 0)


def test_rounding_above_zero_becomes_zero() -> None:
    assert read_scores([None, row(t7=5e-5)], [1, 7], 0).logprobs == [None, 0.0]


@pytest.mark.parametrize("rows", [{}, "x", [None], [None, None], [None, []], [None, {"7": None}], [None, {"7": -1.0}]])
def test_rows_of_another_shape(rows: Any) -> None:
    with pytest.raises(ScoringError) as caught:
        read_scores(rows, [1, 7], 0)
    assert caught.value.kind == "protocol"


def test_candidates_that_are_no_ids() -> None:
    with pytest.raises(ScoringError, match="not named by their ids"):
        read_scores([None, {"7": {"logprob": -1.0}, " the": {"logprob": -0.5}}], [1, 7], 1)


def test_reading_is_quick() -> None:
    ids = list(range(16_000))
    rows = [None, *({str(i): {"logprob": -1.0, "rank": 1, "decoded_token": None}} for i in ids[1:])]
    began = time.process_time()
    read_scores(rows, ids, 0)
    assert time.process_time() - began < 0.5
