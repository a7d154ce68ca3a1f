"""The gateway over a real loopback port: what a worker gets is what the run's own policy gave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from agent_loop.policy import ScriptedPolicy
from agent_loop.types import Completion, PolicyError, SamplingParams
from distill.gateway import Gateway, GatewayPolicy, connect

PARAMS = SamplingParams(max_tokens=4, temperature=0.5, top_k=3, stop_token_ids=(7, 9), seed=11, top_logprobs=2)


class Remembering:
    """Answers with one completion and keeps what it was asked."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.asked: list[tuple[list[int], SamplingParams, str]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        self.asked.append((list(prompt_ids), params, key))
        return self.completion

    async def aclose(self) -> None: ...


class Waiting:
    """Never answers; says whether it was given up."""

    def __init__(self) -> None:
        self.begun, self.given_up = asyncio.Event(), asyncio.Event()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up.set()
        raise AssertionError

    async def aclose(self) -> None: ...


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.start()
    yield gateway
    await gateway.aclose()


@pytest.mark.parametrize(
    "completion",
    [
        Completion(token_ids=(5, 7), logprobs=(-0.1, -1e-17), finish_reason="stop", policy_version=None),
        Completion(
            token_ids=(5, 6),
            logprobs=(-1 / 3, 0.0),
            finish_reason="length",
            policy_version=3,
            token_versions=(None, 3),
            topk=(((5, -0.1), (8, -2.5)), ((6, 0.0), (1, -30.0))),
            num_cached_tokens=0,
        ),
    ],
)
async def test_question_and_answer_arrive_as_they_were(gateway: Gateway, completion: Completion) -> None:
    policy = Remembering(completion)
    transport = connect(gateway.base_url, gateway.key)
    got = await GatewayPolicy(transport, gateway.offer(policy)).sample([1, 2, 3], PARAMS, key="1/a/0")
    await transport.aclose()
    assert got == completion
    assert policy.asked == [([1, 2, 3], PARAMS, "1/a/0")]


async def test_each_name_has_its_policy(gateway: Gateway) -> None:
    names = [gateway.offer(ScriptedPolicy([[i]], stop_token_ids=[i])) for i in (4, 5)]
    transport = connect(gateway.base_url, gateway.key)
    ids = [(await GatewayPolicy(transport, name).sample([1], PARAMS)).token_ids for name in reversed(names)]
    assert ids == [(5,), (4,)]
    gateway.withdraw(names[0])
    with pytest.raises(PolicyError, match="404: no policy"):
        await GatewayPolicy(transport, names[0]).sample([1], PARAMS)
    await transport.aclose()


async def test_an_error_of_the_policy_keeps_its_kind_and_words(gateway: Gateway) -> None:
    transport = connect(gateway.base_url, gateway.key)
    name = gateway.offer(ScriptedPolicy([], stop_token_ids=[]))
    with pytest.raises(PolicyError) as caught:
        await GatewayPolicy(transport, name).sample([1], PARAMS)
    await transport.aclose()
    assert (caught.value.kind, str(caught.value)) == ("rejected", "the script has no more turns")


async def test_nothing_is_sampled_without_the_key(gateway: Gateway) -> None:
    policy = Remembering(Completion(token_ids=(5,), logprobs=(-0.1,), finish_reason="stop", policy_version=None))
    transport = connect(gateway.base_url, gateway.key[:-1])
    with pytest.raises(PolicyError, match="401: Unauthorized"):
        await GatewayPolicy(transport, gateway.offer(policy)).sample([1], PARAMS)
    await transport.aclose()
    assert policy.asked == []


async def test_a_worker_that_hangs_up_ends_the_sampling(gateway: Gateway) -> None:
    policy = Waiting()
    transport = connect(gateway.base_url, gateway.key)
    asking = asyncio.create_task(GatewayPolicy(transport, gateway.offer(policy)).sample([1], PARAMS))
    async with asyncio.timeout(20):
        await policy.begun.wait()
        asking.cancel()
        await policy.given_up.wait()
    await asyncio.gather(asking, return_exceptions=True)
    await transport.aclose()
