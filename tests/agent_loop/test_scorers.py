"""The ways to score: each gives the numbers that the server's model has, or a typed error."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from agent_loop.scorers import FastScorer, PlainScorer, PluginScorer, choose_scorer, read_npy, read_table
from agent_loop.scoring import ScoringError
from agent_loop.transport import HttpTransport
from tests.fakes.fake_vllm import FakeVllm

IDS = [3, 14, 15, 9, 26, 5, 35]
ROWS = [2, 3, 6]


@asynccontextmanager
async def serve(**options: Any) -> AsyncIterator[tuple[FakeVllm, HttpTransport]]:
    with FakeVllm("teacher", 64, **options) as server:
        transport = HttpTransport(server.base_url, retry_deadline_s=0.2)
        try:
            yield server, transport
        finally:
            await transport.aclose()


def expected(server: FakeVllm) -> list[float | None]:
    states = server.invented.states(IDS)
    return [server.invented.logprob(states[i], IDS[i]) if i in ROWS else None for i in range(len(IDS))]


@pytest.mark.parametrize("scorer", [PlainScorer(), PlainScorer("generate"), FastScorer()], ids=lambda s: s.name)
async def test_the_asked_rows_and_no_others(scorer: Any) -> None:
    async with serve(scores_given_ids=True) as (server, transport):
        scores = await scorer.score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=5.0)
        assert scores.logprobs == pytest.approx(expected(server), abs=1e-6)
        assert scores.topk is None


@pytest.mark.parametrize("api", ["completions", "generate"])
async def test_plain_names_the_likeliest(api: Any) -> None:
    async with serve(generates=True) as (server, transport):
        scores = await PlainScorer(api).score(transport, "teacher", IDS, ROWS, top_k=2, timeout_s=5.0)
        assert scores.topk is not None
        state = server.invented.states(IDS)[6]
        best = [server.invented.at_rank(state, rank) for rank in range(2)]
        assert scores.topk[6] == [(i, server.invented.logprob(state, i)) for i in best]
        assert [row is not None for row in scores.topk] == [i in ROWS for i in range(len(IDS))]


async def test_generate_is_asked_not_to_detokenise() -> None:
    async with serve(generates=True) as (server, transport):
        await PlainScorer("generate").score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=5.0)
        assert server.received[-1].payload["sampling_params"]["detokenize"] is False


async def test_fast_scores_given_ids_in_their_order() -> None:
    candidates = [[1, 60, 7], [8, 2, 3], [35, 0, 63]]
    async with serve(scores_given_ids=True) as (server, transport):
        scores = await FastScorer().score(
            transport, "teacher", IDS, ROWS, top_k=3, timeout_s=5.0, candidates=candidates
        )
        assert scores.topk is not None
        assert scores.logprobs == pytest.approx(expected(server), abs=1e-6)
        states = server.invented.states(IDS)
        for row, ids in zip(ROWS, candidates, strict=True):
            found = scores.topk[row] or []
            assert [i for i, _ in found] == ids
            assert [p for _, p in found] == pytest.approx([server.invented.logprob(states[row], i) for i in ids])


async def test_fast_asks_from_the_first_needed_row_on() -> None:
    async with serve(scores_given_ids=True) as (server, transport):
        await FastScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=5.0)
        (request,) = server.received
        params = request.payload["sampling_params"]
        assert params["prompt_logprob_start"] == 1
        assert params["prompt_logprob_token_ids"] == [[15], [9], [-1], [-1], [35]]


async def test_a_cached_prefix_past_the_first_row_costs_one_more_request() -> None:
    async with serve(scores_given_ids=True, cached_tokens=4) as (server, transport):
        scores = await FastScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=5.0)
        assert scores.logprobs == pytest.approx(expected(server), abs=1e-6)
        sent = [r.payload["sampling_params"]["skip_reading_prefix_cache"] for r in server.received]
        assert sent == [False, True]
    async with serve(scores_given_ids=True, cached_tokens=1) as (server, transport):
        await FastScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=5.0)
        assert len(server.received) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("minus_9999", "not_finite", r"token 2 \(id 15\) is -9999.0"),
        ("nan", "not_finite", "is nan"),
        ("null", "protocol", "None where base64 scores belong"),
        ("short", "protocol", r"float32 \(4, 1\), not float32 \(5, 1\)"),
        ("truncated_json", "protocol", "no JSON"),
        ("html", "protocol", "no JSON"),
        ("http_500", "unavailable", "answered 500"),
        ("stall", "unavailable", "did not answer"),
    ],
)
async def test_rubbish_from_the_fast_request_is_a_typed_error(fault: str, kind: str, message: str) -> None:
    async with serve(scores_given_ids=True) as (server, transport):
        server.fault_after(0, fault, only_scoring=True)
        with pytest.raises(ScoringError, match=message) as caught:
            await FastScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=0.5)
        assert caught.value.kind == kind


@pytest.mark.parametrize("fault", ["minus_9999", "nan", "null", "short", "wrong_ids"])
async def test_rubbish_from_generate_is_a_typed_error(fault: str) -> None:
    async with serve(generates=True) as (server, transport):
        server.fault_after(0, fault)
        with pytest.raises(ScoringError):
            await PlainScorer("generate").score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=0.5)


@pytest.mark.parametrize(
    ("options", "asked", "name"),
    [
        ({}, {}, "plain (completions)"),
        ({"generates": True}, {}, "plain (generate)"),
        ({"generates": True}, {"top_k": 3}, "plain (generate)"),
        ({"scores_given_ids": True}, {}, "fast"),
        ({"scores_given_ids": True}, {"top_k": 3}, "plain (generate)"),
        ({"scores_given_ids": True}, {"top_k": 3, "given_ids": True}, "fast"),
    ],
)
async def test_the_probe_takes_the_best_that_is_there(
    options: dict[str, Any], asked: dict[str, Any], name: str
) -> None:
    async with serve(**options) as (_, transport):
        assert (await choose_scorer(transport, "teacher", **asked)).name == name


async def test_given_ids_without_a_server_that_scores_them() -> None:
    async with serve(generates=True) as (_, transport):
        with pytest.raises(ScoringError, match=r'loss\.candidates = "student" needs .* V2 model runner') as caught:
            await choose_scorer(transport, "teacher", top_k=3, given_ids=True)
        assert caught.value.kind == "rejected"
        for scorer in (PlainScorer(), PluginScorer()):
            with pytest.raises(ScoringError, match="cannot score given ones"):
                await scorer.score(transport, "teacher", IDS, ROWS, top_k=1, timeout_s=1.0, candidates=[[1]] * 3)


async def test_no_server_is_not_taken_for_a_poor_one() -> None:
    transport = HttpTransport("http://127.0.0.1:9/v1", retry_deadline_s=0.1)
    with pytest.raises(ScoringError) as caught:
        await choose_scorer(transport, "teacher")
    assert caught.value.kind == "unavailable"
    await transport.aclose()


def npy(array: Any, claims: bytes = b"") -> str:
    """Base64 of a .npy file; `claims` is a shape to lie about."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    shape = str(array.shape).encode() + b", }"
    raw = buffer.getvalue()
    if claims:
        claimed = claims + b", }"
        raw = raw.replace(shape + b" " * (len(claimed) - len(shape)), claimed)
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "no base64!",
        base64.b64encode(b"no numpy file").decode(),
        npy(np.zeros((3, 1), np.float64)),
        npy(np.zeros((1, 3), np.float32)),
        npy(np.zeros((3, 1), ">f4")),
        npy(np.array([[{"pickled": True}]] * 3)),
        npy(np.zeros((3, 1), np.float32))[:-4],
        npy(np.zeros((3, 1), np.float32), claims=b"(3, 1000000000)"),
    ],
)
def test_what_is_no_table_of_float32(text: Any) -> None:
    with pytest.raises(ScoringError) as caught:
        read_npy(text, (3, 1))
    assert caught.value.kind == "protocol"


def table(ids: Any, logprobs: Any) -> dict[str, Any]:
    return {
        "ids": base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode(),
        "logprobs": base64.b64encode(np.asarray(logprobs, "<f4").tobytes()).decode(),
    }


def test_the_plugins_table() -> None:
    scores = read_table(table([[15, 4, 15], [35, 35, 2]], [[-1, -0.5, -1], [0.00001, 0.00001, -9]]), IDS, [2, 6], 2)
    assert scores.logprobs == [None, None, -1.0, None, None, None, 0.0]
    assert scores.topk is not None
    assert scores.topk[2] == [(4, -0.5), (15, -1.0)]
    assert scores.topk[3] is None


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (table([[15], [36]], [[-1], [-1]]), "protocol", r"id 36 for token 6 \(id 35\)"),
        (table([[15]], [[-1]]), "protocol", r"4 bytes of scores came back, not 8"),
        (table([[15], [35]], [[-1, -1], [-1, -1]]), "protocol", "16 bytes"),
        (table([[15], [35]], [[-1], [math.nan]]), "not_finite", r"token 6 \(id 35\) is nan"),
        (table([[15], [35]], [[-1], [-math.inf]]), "not_finite", "is -inf"),
        (table([[15], [35]], [[-9999], [-1]]), "not_finite", "is -9999.0"),
        (table([[15], [35]], [[-1], [0.5]]), "not_finite", "is 0.5"),
        ({"ids": "", "logprobs": ""}, "protocol", "0 bytes"),
        ({}, "protocol", "None where base64"),
        ({"ids": [1], "logprobs": 3}, "protocol", "where base64"),
    ],
)
def test_rubbish_from_the_plugin_is_a_typed_error(reply: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message) as caught:
        read_table(reply, IDS, [2, 6], 0)
    assert caught.value.kind == kind
