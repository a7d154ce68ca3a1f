"""Rollouts on a real vLLM: each token is known by the weights that sampled it, in an update in mid-completion too."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_loop.policy import VllmPolicy
from agent_loop.trace import TraceBuilder
from agent_loop.transport import HttpTransport
from agent_loop.types import SamplingParams, TokenTrace
from distill.publish import Control, reload_weights
from distill.serving.vllm import Server
from tests.conformance.models import reference, save, tiny_qwen3, token_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOLERANCE = 1e-3
"""Nats, float32 on both sides."""
PROMPTS = [random.Random(n).choices(range(1, 512), k=16) for n in range(8)]


@pytest.fixture
async def policy(student_server: Server, student_folder: Path) -> AsyncIterator[VllmPolicy]:
    transport = HttpTransport(student_server.base_url, student_server.api_key, retry_deadline_s=5.0)
    await reload_weights(Control(transport), str(student_folder), 1)
    policy = VllmPolicy(transport, "student")
    assert await policy.probe() == "generate"
    yield policy
    await policy.aclose()


async def sampled(policy: VllmPolicy, prompt: list[int], **params: int) -> TokenTrace:
    builder = TraceBuilder(prompt)
    builder.add_completion(await policy.sample(prompt, SamplingParams(**params), key=str(prompt)), turn=0)
    [trace] = builder.traces()
    return trace


async def test_an_update_in_mid_completion(policy: VllmPolicy, student_server: Server, tmp_path: Path) -> None:
    models = {1: tiny_qwen3(), 2: tiny_qwen3(seed=2)}
    save(models[2], tmp_path)
    control = HttpTransport(student_server.base_url, student_server.api_key)
    playing = [asyncio.create_task(sampled(policy, prompt, max_tokens=230, seed=n)) for n, prompt in enumerate(PROMPTS)]
    await asyncio.sleep(0.3)
    await reload_weights(Control(control), str(tmp_path), 2)
    await control.aclose()
    traces = await asyncio.gather(*playing)
    split = [trace for trace in traces if trace.policy_versions is not None and {1, 2} <= set(trace.policy_versions)]
    assert split, "no completion was under way during the update"
    for trace in traces:
        assert trace.policy_versions is not None
        assert trace.policy_versions[:16] == [None] * 16
        versions = [version or 0 for version in trace.policy_versions[16:]]
        assert versions == sorted(versions)
        expected = {version: token_logprobs(model, trace.token_ids) for version, model in models.items()}
        for i, version in enumerate(versions, 16):
            assert trace.sampling_logprobs[i] == pytest.approx(expected[version][i - 1], abs=TOLERANCE), (i, version)


@pytest.mark.parametrize("api", ["completions", "generate"])
async def test_the_student_s_own_candidates(policy: VllmPolicy, api: str) -> None:
    policy.api = "generate" if api == "generate" else "completions"
    policy.policy_version = 1
    trace = await sampled(policy, PROMPTS[0], max_tokens=12, seed=3, top_logprobs=8)
    assert trace.policy_versions == [None] * 16 + [1] * (len(trace) - 16)
    assert trace.sampling_topk is not None
    best = reference(tiny_qwen3(), trace.token_ids)[15:-1].topk(8)
    for i, values in enumerate(best.values.tolist(), 16):
        assert trace.sampling_topk.logprobs[i] == pytest.approx(values, abs=TOLERANCE)
    assert trace.sampling_topk.token_ids[:16] == [None] * 16
