"""The turn loop: every way in which an episode ends, and that no episode touches another."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from agent_loop.chat_policy import ChatPolicy
from agent_loop.conversation import MessageActor, Sampling, TokenActor, seed_of
from agent_loop.policy import ScriptedPolicy, VllmPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episode, run_episodes
from agent_loop.transport import HttpTransport
from agent_loop.types import Completion, Episode, SamplingParams, SegmentSource
from envs.tool_env import Grader, ToolEnv
from envs.types import AssistantMessage, Limits, StepOutcome, StopReason, Task
from tests.fakes.fake_vllm import FakeVllm
from tools.tool import Tool, ToolOutput, tool

TASK = Task(id="a", messages=({"role": "user", "content": "add the numbers 12 and 7"},), metadata={"answer": "19"})
CALL = '<tool_call>{"name": "add", "arguments": {"a": 12, "b": 7}}</tool_call>'
BROKEN = '<tool_call>{"name": "add", "arg</tool_call>'


@tool
def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: first.
        b: second.
    """
    return a + b


class Adding(ToolEnv):
    """Counts what becomes of its instances."""

    made = 0
    closed = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        Adding.made += 1

    def tools(self) -> Sequence[Tool]:
        return [add]

    def grader(self) -> Grader:
        return lambda task, state, messages: {"success": float(task.metadata["answer"] in messages[-1]["content"])}

    async def aclose(self) -> None:
        Adding.closed += 1


@pytest.fixture(autouse=True)
def counts() -> None:
    Adding.made = Adding.closed = 0


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer: Path) -> Renderer:
    return load_renderer(tiny_tokenizer)


def script(renderer: Renderer, *texts: str) -> ScriptedPolicy:
    """Says the texts, a turn each; one that ends in `...` is not closed."""
    ids = [
        renderer.encode(text.removesuffix("...")) + [renderer.close_id] * (not text.endswith("...")) for text in texts
    ]
    return ScriptedPolicy(ids, stop_token_ids=renderer.stop_token_ids)


async def play(
    renderer: Renderer, *texts: str, env: ToolEnv | None = None, sampling: Sampling | None = None, **limits: Any
) -> Episode:
    env = env or Adding(limits=Limits(**limits))
    return await run_episode(EpisodeJob(task=TASK), env, TokenActor(renderer, script(renderer, *texts), sampling))


# How episodes end


async def test_an_episode_token_for_token(tiny: Renderer) -> None:
    episode = await play(tiny, CALL, "19")
    assert (episode.id, episode.stop_reason, episode.error) == ("0/a/0", StopReason.LAST_TOOL, None)
    assert (episode.reward, episode.rewards) == (None, {})
    first, last = episode.turns
    assert first.tool_results[0].content == "19"
    assert first.observation == ({"role": "tool", "tool_call_id": "call_0_0", "name": "add", "content": "19"},)
    assert last.message.content == "19"
    assert last.observation == ()
    [trace] = episode.traces
    prompt = tiny.render_prompt(TASK.messages, Adding().tool_specs)
    assert trace.token_ids[: len(prompt)] == prompt
    assert (first.start, last.end) == (len(prompt), len(trace))
    assert trace.token_ids[first.start : first.end] == [*tiny.encode(CALL), tiny.close_id]
    sources = [segment.source for segment in trace.segments]
    assert sources == [
        SegmentSource.PROMPT,
        SegmentSource.ASSISTANT,
        SegmentSource.GLUE,
        SegmentSource.TOOL,
        SegmentSource.ASSISTANT,
    ]
    assert trace.num_trained == episode.num_sampled == sum((t.end or 0) - (t.start or 0) for t in episode.turns)
    assert set(episode.timing) == {"sample", "env", "total"}
    assert episode.metadata == {}


async def test_an_environment_says_what_was_played_against(tiny: Renderer) -> None:
    class Stored(Adding):
        def episode_metadata(self) -> dict[str, Any]:
            return {"pages": {"turns": len(self.messages)}}

    class Broken(Adding):
        def episode_metadata(self) -> dict[str, Any]:
            raise OSError("no manifest")

    assert (await play(tiny, CALL, "19", env=Stored())).metadata == {"pages": {"turns": 4}}
    episode = await play(tiny, CALL, "19", env=Broken())
    assert episode.error is not None
    assert (episode.stop_reason, episode.error.boundary, len(episode.turns)) == (StopReason.ERROR, "env", 2)


@pytest.mark.parametrize(
    ("texts", "limits", "reason", "turns"),
    [
        ([CALL, CALL, CALL], {"max_turns": 2}, StopReason.MAX_TURNS, 2),
        ([CALL, CALL, CALL], {"max_tool_calls": 1}, StopReason.MAX_TOOL_CALLS, 2),
        ([CALL, CALL, CALL], {"max_calls_per_tool": {"add": 1}}, StopReason.TOOL_BUDGET, 2),
        ([BROKEN], {"max_parse_errors": 0}, StopReason.PARSE_ERROR, 1),
        ([BROKEN], {"on_parse_error": "stop"}, StopReason.PARSE_ERROR, 1),
        (["a long reply..."], {"max_turn_tokens": 4}, StopReason.MAX_TURN_TOKENS, 1),
        ([CALL, "19 ..."], {"max_turn_tokens": 500}, StopReason.CONTEXT_OVERFLOW, 2),
        ([CALL, CALL, "ok"], {"max_turns": 5, "termination_policy": "max_turns"}, StopReason.ERROR, 3),
    ],
)
async def test_budgets(
    tiny: Renderer, texts: list[str], limits: dict[str, Any], reason: StopReason, turns: int
) -> None:
    episode = await play(tiny, *texts, **limits)
    assert (episode.stop_reason, len(episode.turns)) == (reason, turns)
    assert episode.traces[0].num_trained == episode.num_sampled > 0


async def test_the_token_budget_cuts_a_turn_and_then_the_episode(tiny: Renderer) -> None:
    prompt = len(tiny.render_prompt(TASK.messages, Adding().tool_specs))
    turn = len(tiny.encode(CALL)) + 1
    cut = await play(tiny, CALL, max_episode_tokens=prompt + 5)
    assert (cut.stop_reason, len(cut.traces[0])) == (StopReason.MAX_TOKENS, prompt + 5)
    spent = await play(tiny, CALL, CALL, max_episode_tokens=prompt + turn + 2)  # the tool's answer takes the rest
    assert (spent.stop_reason, len(spent.turns)) == (StopReason.MAX_TOKENS, 1)
    at_once = await play(tiny, CALL, max_episode_tokens=prompt)
    assert (at_once.stop_reason, at_once.turns, at_once.error) == (StopReason.MAX_TOKENS, [], None)


async def test_the_context_cuts_too(tiny: Renderer) -> None:
    prompt = len(tiny.render_prompt(TASK.messages, Adding().tool_specs))
    cut = await play(tiny, CALL, sampling=Sampling(max_context=prompt + 3))
    assert (cut.stop_reason, cut.num_sampled) == (StopReason.CONTEXT_OVERFLOW, 3)
    full = await play(tiny, CALL, sampling=Sampling(max_context=prompt))
    assert (full.stop_reason, full.turns) == (StopReason.CONTEXT_OVERFLOW, [])


async def test_a_server_that_knows_its_context_better(tiny: Renderer) -> None:
    with FakeVllm("m", tiny.vocab_size, max_model_len=20) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        episode = await run_episode(EpisodeJob(task=TASK), Adding(), TokenActor(tiny, policy))
        await policy.aclose()
    assert (episode.stop_reason, episode.error, len(episode.traces)) == (StopReason.CONTEXT_OVERFLOW, None, 1)


async def test_a_masked_turn_is_answered_but_not_trained_on(tiny: Renderer) -> None:
    episodes = [await play(tiny, BROKEN, CALL, "19", on_parse_error=policy) for policy in ("mask", "train")]
    masked, trained = episodes
    assert [turn.num_parse_errors for turn in masked.turns] == [1, 0, 0]
    assert "malformed_call" in masked.turns[0].observation[0]["content"]
    assert masked.traces[0].token_ids == trained.traces[0].token_ids
    turn = masked.turns[0]
    assert not any(masked.traces[0].loss_mask[turn.start : turn.end])
    assert masked.traces[0].num_trained == trained.traces[0].num_trained - ((turn.end or 0) - (turn.start or 0))
    assert masked.traces[0].sampling_logprobs[turn.start or 0] == -1.0  # it was sampled all the same


@pytest.mark.parametrize("text", ["", "<tool_call>", "</tool_call>", "user", "<think>hm"])
async def test_odd_turns_end_well(tiny: Renderer, text: str) -> None:
    episode = await play(tiny, text, max_turns=1)
    assert episode.error is None
    assert episode.stop_reason in (StopReason.LAST_TOOL, StopReason.MAX_TURNS)


async def test_bytes_of_half_a_character_keep_their_ids(tiny: Renderer) -> None:
    ids = [*tiny.encode("é")[:1], tiny.close_id]
    policy = ScriptedPolicy([ids], stop_token_ids=tiny.stop_token_ids)
    episode = await run_episode(EpisodeJob(task=TASK), Adding(), TokenActor(tiny, policy))
    assert episode.traces[0].token_ids[-2:] == ids
    assert episode.stop_reason is StopReason.LAST_TOOL


async def test_an_environment_with_an_opening_of_its_own(tiny: Renderer) -> None:
    class Greeting(Adding):
        async def areset(self, **kwargs: Any) -> Any:
            messages, info = await super().areset(**kwargs)
            return ({"role": "system", "content": "You add."}, *messages), info

    episode = await play(tiny, "19", env=Greeting())
    assert "You add." in tiny.decode(episode.traces[0].token_ids)
    assert episode.task.messages[0]["content"] == "You add."
    assert (episode.task.id, len(TASK.messages)) == ("a", 1)


# Failures


class Faulty(Adding):
    """Fails as it is told to."""

    def __init__(self, fault: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault = fault
        self.cancelled = 0

    async def _fail(self, at: str) -> None:
        where, _, how = self.fault.partition(":")
        if where != at:
            return
        if how == "raise":
            raise RuntimeError("a bug of the author's")
        if how == "timeout":
            raise TimeoutError("of the author's own")
        if how == "recursion":
            await self._fail(at)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "hang":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def on_reset(self, task: Task) -> None:
        await self._fail("reset")

    async def astep(self, action: AssistantMessage) -> StepOutcome:
        await self._fail("step")
        outcome = await super().astep(action)
        if self.fault == "info":
            return outcome._replace(info={})
        if self.fault == "content":
            return outcome._replace(observation=({"role": "user", "content": 5},))  # type: ignore[typeddict-item]
        return outcome

    async def verify(self) -> dict[str, float]:
        await self._fail("verify")
        values: dict[str, Any] = {"nan": {"success": math.nan}, "none": None, "text": {"success": "yes"}}
        return values[self.fault] if self.fault in values else await super().verify()

    async def aclose(self) -> None:
        await super().aclose()
        await self._fail("close")


@pytest.mark.parametrize(
    ("fault", "boundary", "kind", "turns"),
    [
        ("reset:raise", "env", "RuntimeError", 0),
        ("reset:recursion", "env", "RecursionError", 0),
        ("step:raise", "env", "RuntimeError", 1),
        ("step:timeout", "env", "TimeoutError", 1),
        ("info", "env", "KeyError", 1),
        ("content", "renderer", "RendererError", 1),
    ],
)
async def test_an_author_s_bug_is_recorded_where_it_happened(
    tiny: Renderer, fault: str, boundary: str, kind: str, turns: int
) -> None:
    episode = await play(tiny, CALL, "19", env=Faulty(fault))
    assert episode.stop_reason is StopReason.ERROR
    assert episode.error is not None
    assert (episode.error.boundary, episode.error.kind) == (boundary, kind)
    assert len(episode.turns) == turns
    assert len(episode.traces) == (1 if turns else 0)


async def test_a_tool_that_breaks_its_contract(tiny: Renderer) -> None:
    @tool(name="add")
    def careless(a: int, b: int) -> ToolOutput:
        """Add, with metadata that no file can hold."""
        return ToolOutput(content="19", metadata={"x": object()})

    class Careless(Adding):
        def tools(self) -> Sequence[Tool]:
            return [careless]

    episode = await play(tiny, CALL, env=Careless())
    assert episode.error is not None
    assert (episode.error.boundary, episode.error.kind) == ("tool", "ToolContractError")


@pytest.mark.parametrize("where", ["reset", "step"])
async def test_a_hanging_environment_is_cancelled_in_time(tiny: Renderer, where: str) -> None:
    env = Faulty(f"{where}:hang", limits=Limits(timeout_s=0.1))
    async with asyncio.timeout(5):
        episode = await play(tiny, CALL, env=env)
    assert (episode.stop_reason, episode.error, env.cancelled) == (StopReason.TIMEOUT, None, 1)
    assert len(episode.traces) == (where == "step")


async def test_a_hanging_server_is_left_in_time(tiny: Renderer) -> None:
    with FakeVllm("m", tiny.vocab_size) as server:
        server.fault_after(1, "stall")
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        env = Adding(limits=Limits(timeout_s=0.4, max_turn_tokens=5, termination_policy="max_turns"))
        episodes = []
        for sample in range(2):
            job = EpisodeJob(task=TASK, sample_index=sample)
            episodes.append(await run_episode(job, env, TokenActor(tiny, policy)))
        await policy.aclose()
    assert [e.stop_reason for e in episodes] == [StopReason.MAX_TURN_TOKENS, StopReason.TIMEOUT]


async def test_the_clock_stands_still_while_no_server_is_there(tiny: Renderer) -> None:
    """A server goes away for longer than an episode may take, and comes back at the same address."""
    from distill.serving.fleet import Fleet

    with FakeVllm("m", tiny.vocab_size) as server:
        fleet = Fleet.given("student", [server.base_url], None, max_outage_s=60)
        await fleet.start()
    limits = Limits(timeout_s=4.0, max_turn_tokens=5, termination_policy="max_turns")
    policy = VllmPolicy(fleet, "m")

    def play(sample: int, **clock: Any) -> asyncio.Task[Episode]:
        job = EpisodeJob(task=TASK, sample_index=sample)
        return asyncio.create_task(run_episode(job, Adding(limits=limits), TokenActor(tiny, policy), **clock))

    waits, gives_up = play(0, away_s=lambda: fleet.away_s), play(1)
    assert (await gives_up).stop_reason is StopReason.TIMEOUT
    await asyncio.sleep(1.5)
    assert not waits.done()
    with FakeVllm("m", tiny.vocab_size, port=int(urlsplit(server.base_url).port or 0)):
        episode = await waits
    await fleet.aclose()
    assert episode.stop_reason is StopReason.MAX_TURN_TOKENS
    assert episode.timing["total"] > limits.timeout_s
    assert fleet.away_s > episode.timing["total"] - limits.timeout_s


async def test_a_model_that_hangs_between_outages_is_left_in_time(tiny: Renderer) -> None:
    """An outage that was over before does not give the episode more time than it lasted."""
    began = time.monotonic()

    def away_s() -> float:
        return 100.0 + min(time.monotonic() - began, 0.3)

    env = Faulty("step:hang", limits=Limits(timeout_s=0.2))
    async with asyncio.timeout(5):
        actor = TokenActor(tiny, script(tiny, CALL))
        episode = await run_episode(EpisodeJob(task=TASK), env, actor, away_s=away_s)
    assert episode.stop_reason is StopReason.TIMEOUT
    assert 0.45 < episode.timing["total"] < 2.0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("wrong_ids", "protocol"),
        ("minus_9999", "protocol"),
        ("nan", "protocol"),
        ("null", "protocol"),
        ("short", "protocol"),
        ("truncated_json", "protocol"),
        ("html", "protocol"),
        ("http_500", "unavailable"),
    ],
)
async def test_nothing_of_a_bad_reply_is_kept(tiny: Renderer, fault: str, kind: str) -> None:
    with FakeVllm("m", tiny.vocab_size) as server:
        server.fault_after(0, fault)
        policy = VllmPolicy(HttpTransport(server.base_url, retry_deadline_s=0.2), "m")
        episode = await run_episode(EpisodeJob(task=TASK), Adding(), TokenActor(tiny, policy))
        await policy.aclose()
    assert episode.error is not None
    assert (episode.error.boundary, episode.error.kind, episode.turns) == ("student", kind, [])
    assert [trace.num_trained for trace in episode.traces] == [0]


# Grading


async def test_nothing_is_graded_unless_it_is_wanted(tiny: Renderer) -> None:
    class Never(Adding):
        def grader(self) -> Grader:
            raise AssertionError("built under skip_verification")

    assert (await play(tiny, "19", env=Never())).reward is None
    graded = await play(tiny, "19", env=Adding(skip_verification=False))
    assert (graded.reward, graded.rewards) == (1.0, {"success": 1.0})
    wrong = await play(tiny, "18", env=Adding(skip_verification=False))
    assert wrong.reward == 0.0


async def test_an_episode_that_a_budget_cut_is_graded_too(tiny: Renderer) -> None:
    env = Adding(skip_verification=False, limits=Limits(max_turns=1))
    episode = await play(tiny, CALL, env=env)
    assert (episode.stop_reason, episode.reward) == (StopReason.MAX_TURNS, 1.0)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("verify:raise", "RuntimeError", "a bug of the author's"),
        ("verify:hang", "TimeoutError", ""),
        ("nan", "ValueError", "finite numbers by name, found 'success': nan"),
        ("text", "ValueError", "found 'success': 'yes'"),
        ("none", "TypeError", "must return a dict of rewards by name, found NoneType"),
    ],
)
async def test_a_broken_grader_costs_its_own_episode(tiny: Renderer, fault: str, kind: str, message: str) -> None:
    env = Faulty(fault, skip_verification=False, limits=Limits(timeout_s=0.5))
    async with asyncio.timeout(5):
        episode = await play(tiny, "19", env=env)
    assert (episode.stop_reason, episode.reward) == (StopReason.ERROR, None)
    assert episode.error is not None
    assert (episode.error.boundary, episode.error.kind) == ("env", kind)
    assert message in episode.error.message


# Many


class Random:
    """A policy whose every completion follows from the request's seed alone, after a pause that does not."""

    def __init__(self, renderer: Renderer, pauses: Callable[[], float] = lambda: 0.0) -> None:
        self._renderer = renderer
        self._pauses = pauses

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        await asyncio.sleep(self._pauses())
        assert params.seed is not None
        text = CALL if params.seed % 3 else f"the seed is {params.seed}"
        ids = (*self._renderer.encode(text), self._renderer.close_id)
        return Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason="stop", policy_version=1)

    async def aclose(self) -> None: ...


def jobs_of(count: int, seed: int = 0) -> list[EpisodeJob]:
    return [EpisodeJob(task=TASK, sample_index=i, seed=seed) for i in range(count)]


async def run(
    renderer: Renderer,
    count: int,
    max_concurrent: int,
    *,
    make_env: Callable[[], ToolEnv] = Adding,
    pauses: Callable[[], float] = lambda: 0.0,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    policy = Random(renderer, pauses)
    return await run_episodes(
        jobs_of(count),
        make_env=make_env,
        make_actor=lambda: TokenActor(renderer, policy),
        max_concurrent=max_concurrent,
        on_episode=on_episode,
    )


def played(episodes: Sequence[Episode]) -> list[tuple[str, StopReason, list[list[int]]]]:
    return [(e.id, e.stop_reason, [t.token_ids for t in e.traces]) for e in episodes]


async def test_order_bound_and_what_is_played_depend_on_nothing_else(tiny: Renderer) -> None:
    alone = await run(tiny, 30, 1)
    assert (Adding.made, Adding.closed) == (1, 1)
    pauses = iter([0.02, 0.0, 0.01] * 1000)
    endings: list[str] = []
    together = await run(tiny, 30, 7, pauses=lambda: next(pauses), on_episode=lambda e: endings.append(e.id))
    assert (Adding.made, Adding.closed) == (8, 8)
    assert [e.id for e in together] == [f"0/a/{i}" for i in range(30)]
    assert sorted(endings) == sorted(e.id for e in together)
    assert endings != [e.id for e in together]
    assert played(together) == played(alone)
    assert len({len(e.turns) for e in alone}) > 1  # the seeds did differ


async def test_slots_bound_several_calls_together(tiny: Renderer) -> None:
    in_play: list[int] = [0]
    seen: list[int] = []

    class Counted(Adding):
        async def areset(self, **options: Any) -> Any:
            in_play[0] += 1
            seen.append(in_play[0])
            await asyncio.sleep(0.005)
            in_play[0] -= 1
            return await super().areset(**options)

    slots, policy = asyncio.Semaphore(3), Random(tiny)
    both = await asyncio.gather(
        *(
            run_episodes(
                jobs_of(10, seed),
                make_env=Counted,
                make_actor=lambda: TokenActor(tiny, policy),
                max_concurrent=3,
                slots=slots,
            )
            for seed in (1, 2)
        )
    )
    assert [len(episodes) for episodes in both] == [10, 10]
    assert max(seen) == 3
    assert not slots.locked(), "all are given back"


async def test_no_more_environments_than_jobs_and_none_without(tiny: Renderer) -> None:
    assert len(await run(tiny, 2, 50)) == 2
    assert Adding.made == 2
    assert await run(tiny, 0, 50) == []
    assert Adding.made == 2


@pytest.mark.parametrize("fault", ["reset:raise", "step:raise", "reset:hang", "close:raise", "info"])
async def test_siblings_do_not_notice(tiny: Renderer, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = await run(tiny, 12, 4)
    made: list[Faulty] = []

    def make_env() -> ToolEnv:  # the third one made is broken
        made.append(Faulty(fault if len(made) == 2 else "", limits=Limits(timeout_s=0.3)))
        return made[-1]

    async with asyncio.timeout(20):
        episodes = await run(tiny, 12, 4, make_env=make_env)
    bad = [e for e in episodes if e.stop_reason in (StopReason.ERROR, StopReason.TIMEOUT)]
    assert len(bad) == (fault != "close:raise")
    good = [(a, b) for a, b in zip(episodes, whole, strict=True) if a not in bad]
    assert played([a for a, _ in good]) == played([b for _, b in good])
    # What failed is not used again; while one hangs, the others play all there is.
    assert len(made) == 4 + (bool(bad) and fault != "reset:hang")
    assert Adding.closed == 4 + len(made)
    assert ("did not close: RuntimeError" in caplog.text) == (fault == "close:raise")


@pytest.mark.parametrize("where", ["make_env", "on_episode"])
async def test_the_caller_s_own_errors_come_back_as_they_are(tiny: Renderer, where: str) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("the disk is full")

    parts: dict[str, Any] = {where: fail}
    with pytest.raises(OSError, match="the disk is full"):
        await run(tiny, 10, 3, pauses=lambda: 0.01, **parts)
    assert Adding.made == Adding.closed


def test_an_interrupt_is_no_episode_s_failure(tiny: Renderer) -> None:
    with pytest.raises(KeyboardInterrupt):  # asyncio hands it to whoever runs the loop
        asyncio.run(run(tiny, 5, 2, make_env=lambda: Faulty("step:interrupt")))


async def test_cancelling_cancels_and_closes(tiny: Renderer) -> None:
    envs: list[Faulty] = []

    def make_env() -> ToolEnv:
        envs.append(Faulty("step:hang"))
        return envs[-1]

    task = asyncio.create_task(run(tiny, 9, 3, make_env=make_env))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [env.cancelled for env in envs] == [1, 1, 1]
    assert Adding.closed == 3


async def test_jobs_that_cannot_be_told_apart(tiny: Renderer) -> None:
    with pytest.raises(ValueError, match="two jobs have the id '0/a/0'"):
        await run_episodes(
            [EpisodeJob(task=TASK)] * 2, make_env=Adding, make_actor=lambda: TokenActor(tiny, script(tiny)),
            max_concurrent=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_concurrent must be at least 1, got 0"):
        await run(tiny, 1, 0)


def test_seeds_depend_on_run_episode_and_turn() -> None:
    seeds = {
        seed_of(run, key, turn) for run in range(5) for key in ("0/a/0", "0/a/1", "1/a/0") for turn in range(-1, 9)
    }
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "0/a/0", 0) == 704178114  # the same in every process and version


async def test_the_seed_of_a_request_is_sent(tiny: Renderer) -> None:
    with FakeVllm("m", tiny.vocab_size) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        job = EpisodeJob(task=TASK, sample_index=2, step=7, seed=5)
        env = Adding(limits=Limits(max_turn_tokens=3))
        await run_episode(job, env, TokenActor(tiny, policy))
        await policy.aclose()
        [request] = server.received
    assert request.payload["seed"] == seed_of(5, "7/a/2", 0)
    assert request.payload["stop_token_ids"] == list(tiny.stop_token_ids)


# Messages only


async def test_a_model_that_only_speaks_messages() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 12, "b": 7}'}}
    with FakeVllm("m", 64, chat_replies=[{"tool_calls": [call]}, {"content": "It is 19."}]) as server:
        policy = ChatPolicy(server.base_url, "m")
        episode = await run_episode(EpisodeJob(task=TASK), Adding(skip_verification=False), MessageActor(policy))
        await policy.aclose()
    assert (episode.stop_reason, episode.reward, episode.traces) == (StopReason.LAST_TOOL, 1.0, [])
    assert episode.turns[0].tool_results[0].content == "19"
    assert [turn.trace for turn in episode.turns] == [None, None]


async def test_a_message_that_was_cut_off_is_no_answer() -> None:
    with FakeVllm("m", 64, chat_replies=[{"content": "It is", "finish_reason": "length"}]) as server:
        policy = ChatPolicy(server.base_url, "m")
        episode = await run_episode(EpisodeJob(task=TASK), Adding(), MessageActor(policy))
        await policy.aclose()
    assert episode.stop_reason is StopReason.MAX_TURN_TOKENS
