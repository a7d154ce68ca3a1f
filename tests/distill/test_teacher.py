"""The token budget, the privileged context, and laying scores on a trace."""

from __future__ import annotations

import asyncio

import pytest

from agent_loop.scoring import PromptScores
from agent_loop.types import Segment, SegmentSource, TokenTrace
from distill.teacher import TokenBudget, align, with_system_prompt
from distill.types import TeacherError


def trace() -> TokenTrace:
    #           P P A A A T A
    # loss_mask . . # # # . #
    mask = [False, False, True, True, True, False, True]
    return TokenTrace(
        token_ids=[10, 11, 12, 13, 14, 15, 16],
        loss_mask=mask,
        sampling_logprobs=[-1.0 if m else None for m in mask],
        segments=[
            Segment(start=0, end=2, source=SegmentSource.PROMPT, turn=-1),
            Segment(start=2, end=5, source=SegmentSource.ASSISTANT, turn=0),
            Segment(start=5, end=6, source=SegmentSource.TOOL, turn=0),
            Segment(start=6, end=7, source=SegmentSource.ASSISTANT, turn=1),
        ],
    )


def test_scores_are_laid_on_the_trained_tokens_only() -> None:
    scores = PromptScores(logprobs=[None, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6], topk=None)
    assert align(trace(), scores, shift=0, top_k=0).logprobs == [None, None, -0.2, -0.3, -0.4, None, -0.6]


def test_a_longer_context_of_the_teacher_shifts_them() -> None:
    scores = PromptScores(logprobs=[None, -9.0, -9.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6], topk=None)
    assert align(trace(), scores, shift=2, top_k=0).logprobs == [None, None, -0.2, -0.3, -0.4, None, -0.6]


def test_a_missing_number_is_an_error_and_never_zero() -> None:
    scores = PromptScores(logprobs=[None, -0.1, -0.2, None, -0.4, -0.5, -0.6], topk=None)
    with pytest.raises(TeacherError, match="token 3"):
        align(trace(), scores, shift=0, top_k=0)


def test_too_few_candidates_are_an_error() -> None:
    row = [(7, -0.1), (8, -2.5)]
    scores = PromptScores(logprobs=[None] + [-0.1] * 6, topk=[None] + [row] * 6)
    assert align(trace(), scores, shift=0, top_k=2).topk is not None
    with pytest.raises(TeacherError, match="2 of 3 candidates"):
        align(trace(), scores, shift=0, top_k=3)


def test_the_privileged_prompt_stands_before_the_tasks_own() -> None:
    own = with_system_prompt([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "T")
    assert [m["content"] for m in own] == ["T\n\nS", "U"]
    none = with_system_prompt([{"role": "user", "content": "U"}], "T")
    assert [(m["role"], m["content"]) for m in none] == [("system", "T"), ("user", "U")]


async def test_the_budget_is_never_exceeded_and_everyone_gets_a_turn() -> None:
    budget, held, peak, done = TokenBudget(100), 0, 0, 0

    async def request(tokens: int) -> None:
        nonlocal held, peak, done
        async with budget.take(tokens):
            held += min(tokens, 100)
            peak = max(peak, held)
            await asyncio.sleep(0.001)
            held -= min(tokens, 100)
            done += 1

    await asyncio.gather(*(request(t) for t in [60, 30, 30, 500, 10, 99, 1] * 5))
    assert (done, held) == (35, 0)
    assert peak <= 100


async def test_a_cancelled_request_gives_its_tokens_back() -> None:
    budget = TokenBudget(10)
    inside = asyncio.Event()

    async def hold() -> None:
        async with budget.take(10):
            inside.set()
            await asyncio.sleep(60)

    async def wait() -> None:
        async with budget.take(5):
            pass

    holder = asyncio.create_task(hold())
    await inside.wait()
    waiter, other = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    holder.cancel()
    await asyncio.wait_for(other, timeout=1)
    async with asyncio.timeout(1), budget.take(10):
        pass
