"""The token budget, the privileged context, and laying scores on a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from agent_loop.scoring import PromptScores
from agent_loop.transport import HttpTransport
from agent_loop.types import Episode, Segment, SegmentSource, TokenTrace, TopK
from distill.teacher import HttpTeacher, TokenBudget, align
from distill.teacher_context import with_system_prompt
from distill.types import TeacherError
from envs.types import StopReason, Task
from tests.fakes.fake_vllm import FakeVllm


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


async def test_who_waits_stands_with_its_group() -> None:
    budget, served = TokenBudget(10), list[str]()

    async def request(group: str, number: int) -> None:
        async with budget.take(10, group):
            served.append(f"{group}{number}")
            await asyncio.sleep(0)

    # The groups' episodes end in turns; the first is in flight before anyone waits.
    await asyncio.gather(*(request(group, number) for number in range(3) for group in "abc"))
    assert served == ["a0", "b0", "b1", "b2", "c0", "c1", "c2", "a1", "a2"]


def episode(task: str = "t") -> Episode:
    return Episode(
        id=f"0/{task}/0",
        env_id="e",
        task=Task(id=task, messages=({"role": "user", "content": "?"},)),
        turns=[],
        traces=[trace()],
        stop_reason=StopReason.ANSWERED,
    )


@pytest.mark.parametrize(("options", "name"), [({}, "plain (completions)"), ({"generates": True}, "plain (generate)")])
@pytest.mark.parametrize("top_k", [0, 3])
async def test_the_teachers_numbers_lie_on_the_trained_tokens(options: dict[str, bool], name: str, top_k: int) -> None:
    with FakeVllm("teacher", 64, **options) as server:  # type: ignore[arg-type]
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher", top_k=top_k)
        (score,) = await teacher.score(episode())
        assert await teacher.probe() == name
        await teacher.aclose()
        ids, mask = trace().token_ids, trace().loss_mask
        states = server.invented.states(ids)
        assert score.logprobs == [
            server.invented.logprob(states[i], ids[i]) if mask[i] else None for i in range(len(ids))
        ]
        if top_k:
            assert score.topk is not None
            assert score.topk.token_ids[6] == [server.invented.at_rank(states[6], rank) for rank in range(3)]
            assert score.topk.token_ids[5] is None


async def test_fast_scoring_of_sampled_tokens() -> None:
    with FakeVllm("teacher", 64, scores_given_ids=True) as server:
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher")
        assert await teacher.probe() == "fast"
        (score,) = await teacher.score(episode())
        await teacher.aclose()
        ids, mask = trace().token_ids, trace().loss_mask
        states = server.invented.states(ids)
        expected = [server.invented.logprob(states[i], ids[i]) if mask[i] else None for i in range(len(ids))]
        assert score.logprobs == pytest.approx(expected, abs=1e-6)


class Keys(HttpTransport):
    """Remembers the keys of requests that score."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.keys: list[str] = []

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        self.keys.append(key)
        return await super().post_json(path, payload, timeout_s=timeout_s, key=key)


@pytest.mark.parametrize(("options", "key"), [({}, "0/t/0"), ({"scores_given_ids": True}, "t")])
async def test_a_group_goes_to_one_server_where_that_saves_work(options: dict[str, bool], key: str) -> None:
    with FakeVllm("teacher", 64, **options) as server:  # type: ignore[arg-type]
        transport = Keys(server.base_url)
        await HttpTeacher(transport, "teacher").score(episode())
        assert transport.keys[-1] == key
        await transport.aclose()


async def test_one_probe_for_all_who_wait() -> None:
    with FakeVllm("teacher", 64, generates=True) as server:
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher")
        await asyncio.gather(*(teacher.score(episode(f"t{i}")) for i in range(5)))
        await teacher.aclose()
        # `fast` is refused, `generate` answers, five scores
        assert len(server.received) == 7


async def test_a_teacher_that_is_away_is_asked_again_when_it_is_back() -> None:
    teacher = HttpTeacher(HttpTransport("http://127.0.0.1:9/v1", retry_deadline_s=0.05), "teacher")
    for _ in range(2):
        with pytest.raises(TeacherError) as caught:
            await teacher.score(episode())
        assert caught.value.kind == "unavailable"
    await teacher.aclose()


async def test_the_students_candidates_need_a_teacher_that_scores_given_ids() -> None:
    with FakeVllm("teacher", 64, generates=True) as server:
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher", top_k=3, candidates="student")
        with pytest.raises(TeacherError, match=r'loss\.candidates = "student" needs'):
            await teacher.probe()
        await teacher.aclose()


async def test_the_teacher_scores_the_students_candidates() -> None:
    chosen = [[12, 3, 60], [1, 2, 3], [63, 0, 14], None, [5, 16, 6]]
    with FakeVllm("teacher", 64, scores_given_ids=True) as server:
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher", top_k=3, candidates="student")
        played = episode()
        played.traces[0].sampling_topk = TopK(
            token_ids=[None, None, *chosen], logprobs=[None, None, *([-1.0] * 3 if ids else None for ids in chosen)]
        )
        (score,) = await teacher.score(played)
        await teacher.aclose()
        states = server.invented.states(trace().token_ids)
        assert score.topk is not None
        assert score.topk.token_ids == [None, None, *chosen]
        for i, (state, ids) in enumerate(zip(states[2:], chosen, strict=False)):
            expected = [server.invented.logprob(state, token) for token in ids] if ids else None
            assert score.topk.logprobs[2 + i] == (pytest.approx(expected, abs=1e-6) if expected else None)


async def test_a_trace_without_the_students_candidates_is_an_error() -> None:
    with FakeVllm("teacher", 64, scores_given_ids=True) as server:
        teacher = HttpTeacher(HttpTransport(server.base_url), "teacher", top_k=3, candidates="student")
        with pytest.raises(TeacherError, match="4 of 4 sampled tokens have no 3 candidates"):
            await teacher.score(episode())
        await teacher.aclose()
