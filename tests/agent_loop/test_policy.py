"""Policies: what is asked of the server, and that no reply that contradicts itself comes through."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest

from agent_loop.policy import ScriptedPolicy, VllmPolicy
from agent_loop.transport import AsgiTransport, HttpTransport
from agent_loop.types import PolicyError, SamplingParams
from tests.fakes.fake_vllm import FakeVllm

PROMPT = [5, 6, 7]
GOOD: dict[str, Any] = {
    "choices": [
        {
            "token_ids": [8, 9],
            "prompt_token_ids": PROMPT,
            "finish_reason": "stop",
            "logprobs": {"tokens": ["token_id:8", "token_id:9"], "token_logprobs": [-0.5, 5e-5]},
        }
    ],
    "usage": {"prompt_tokens_details": {"cached_tokens": 2}},
    "weight_version": 4,
}


class Canned:
    """A transport that has one reply."""

    def __init__(self, reply: dict[str, Any]) -> None:
        self.reply = reply
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.keys: list[str] = []

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        self.asked.append((path, payload))
        self.keys.append(key)
        return self.reply

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        return self.reply

    async def aclose(self) -> None: ...


def changed(**parts: Any) -> dict[str, Any]:
    """GOOD with parts of its choice replaced; `logprobs__tokens` reaches inside."""
    reply = copy.deepcopy(GOOD)
    for name, value in parts.items():
        outer, _, inner = name.partition("__")
        if inner:
            reply["choices"][0][outer][inner] = value
        else:
            reply["choices"][0][outer] = value
    return reply


async def test_what_is_asked_and_what_is_read() -> None:
    transport = Canned(GOOD)
    params = SamplingParams(max_tokens=2, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(9,), seed=3)
    completion = await VllmPolicy(transport, "m").sample(PROMPT, params, key="0/a/0")
    assert transport.keys == ["0/a/0"]
    [(path, payload)] = transport.asked
    assert path == "/v1/completions"
    assert payload["prompt"] == PROMPT
    assert {k: payload[k] for k in ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "seed")} == {
        "max_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "stop_token_ids": [9],
        "seed": 3,
    }
    assert completion.token_ids == (8, 9)
    assert completion.logprobs == (-0.5, 0.0)
    assert completion.finish_reason == "stop"
    assert completion.policy_version == 4
    assert completion.num_cached_tokens == 2


GENERATED: dict[str, Any] = {
    "prompt_token_ids": PROMPT,
    "choices": [
        {
            "token_ids": [8, 9, 9],
            "finish_reason": "length",
            "weight_versions": [{"version": "11", "start": 0, "end": 2}, {"version": "12", "start": 2, "end": 3}],
            "logprobs": {
                "content": [
                    {"token_id": i, "logprob": -0.5, "top_logprobs": [{"token_id": k, "logprob": -k / 8} for k in top]}
                    for i, top in ((8, (8, 5, 4)), (9, (9, 4, 5)), (9, (5, 4)))
                ]
            },
        }
    ],
    "usage": {"prompt_tokens_details": {"cached_tokens": 0}},
}


def generated(**parts: Any) -> dict[str, Any]:
    """GENERATED with parts of its choice replaced."""
    reply = copy.deepcopy(GENERATED)
    reply["choices"][0].update(parts)
    return reply


async def test_generate_says_of_each_token_which_weights_sampled_it() -> None:
    transport = Canned(GENERATED)
    policy = VllmPolicy(transport, "m", api="generate")
    policy.model = "student-v000011"
    completion = await policy.sample(PROMPT, SamplingParams(max_tokens=3, stop_token_ids=(9,), seed=3), key="0/a/0")
    [(path, payload)] = transport.asked
    assert (path, payload["model"], transport.keys) == ("/inference/v1/generate", "student-v000011", ["0/a/0"])
    assert payload["token_ids"] == PROMPT
    assert payload["sampling_params"] == {
        "max_tokens": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": [9],
        "seed": 3,
        "logprobs": 0,
        "detokenize": False,
    }
    assert completion.token_ids == (8, 9, 9)
    assert completion.token_versions == (11, 11, 12)
    assert completion.policy_version == 11, "the oldest"
    assert completion.topk == ()


@pytest.mark.parametrize(("known", "expected"), [(None, (None, None, 12)), (10, (10, 10, 12))])
async def test_a_label_that_is_no_number_is_what_the_publisher_says(known: int | None, expected: tuple[Any]) -> None:
    spans = [{"version": "default", "start": 0, "end": 2}, {"version": "12", "start": 2, "end": 3}]
    policy = VllmPolicy(Canned(generated(weight_versions=spans)), "m", api="generate")
    policy.policy_version = known
    completion = await policy.sample(PROMPT, SamplingParams(max_tokens=3))
    assert completion.token_versions == expected
    assert completion.policy_version == (known or 12)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": [{"token_ids": [8]}]}, "lacks 'logprobs'"),
        (generated(weight_versions=[{"version": "1", "start": 1, "end": 3}]), "hole at token 0"),
        (
            generated(weight_versions=[{"version": "1", "start": 0, "end": 2}]),
            "came with 2 weight versions",
        ),
        (generated(weight_versions=[{"version": "1", "start": 0}]), "lacks 'end'"),
        (generated(weight_versions=7), "int"),
        (generated(token_ids=[8, 9, 7]), "token 2 has id 7 but its log-probability is of token_id:9"),
        (generated(token_ids=[8, 9]), "2 token ids came with 3 log-probabilities"),
        (generated(logprobs=None), "NoneType"),
    ],
)
async def test_a_generated_reply_that_contradicts_itself(reply: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        await VllmPolicy(Canned(reply), "m", api="generate").sample(PROMPT, SamplingParams(max_tokens=3))
    assert caught.value.kind == "protocol"


async def test_candidates_best_first_on_both_routes() -> None:
    rows = [{"token_id:5": -2.0, "token_id:8": -0.5, "token_id:4": -1.0}, {"token_id:4": 5e-5, "token_id:9": -9.0}]
    completed = VllmPolicy(Canned(changed(logprobs__top_logprobs=rows)), "m")
    completion = await completed.sample(PROMPT, SamplingParams(max_tokens=2, top_logprobs=2))
    assert completion.topk == (((8, -0.5), (4, -1.0)), ((4, 0.0), (9, -9.0)))
    policy = VllmPolicy(Canned(GENERATED), "m", api="generate")
    completion = await policy.sample(PROMPT, SamplingParams(max_tokens=3, top_logprobs=2))
    assert completion.topk == (((4, -0.5), (5, -0.625)),) * 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"token_id:5": -2.0}, {"token_id:5": -2.0, "token_id:6": -3.0}],
            "1 of 2 candidates came",
        ),
        ([{"token_id:5": -2.0, "token_id:6": -3.0}], "2 token ids came with candidates for 1"),
        ([{"w5": -2.0, "w6": -3.0}] * 2, "not log-probabilities by id"),
        ([{"token_id:5": math.nan, "token_id:6": -3.0}] * 2, "not log-probabilities by id"),
        (None, "2 token ids came with candidates for 0"),
    ],
)
async def test_candidates_that_are_none(rows: Any, message: str) -> None:
    policy = VllmPolicy(Canned(changed(logprobs__top_logprobs=rows)), "m")
    with pytest.raises(PolicyError, match=message):
        await policy.sample(PROMPT, SamplingParams(max_tokens=2, top_logprobs=2))


@pytest.mark.parametrize("generates", [True, False])
async def test_the_probe_takes_generate_where_it_is(generates: bool) -> None:
    with FakeVllm("m", 64, generates=generates, weight_version=3) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        assert await policy.probe() == policy.api == ("generate" if generates else "completions")
        completion = await policy.sample(PROMPT, SamplingParams(max_tokens=4, seed=0))
        await policy.aclose()
    assert completion.policy_version == 3
    assert completion.token_versions == ((3,) * len(completion.token_ids) if generates else ())


async def test_the_probe_of_a_server_that_is_not_there() -> None:
    policy = VllmPolicy(HttpTransport("http://127.0.0.1:9/v1", retry_deadline_s=0.1), "m")
    with pytest.raises(PolicyError, match="cannot be reached"):
        await policy.probe()
    await policy.aclose()


async def test_no_seed_is_not_sent() -> None:
    transport = Canned(GOOD)
    await VllmPolicy(transport, "m").sample(PROMPT, SamplingParams(max_tokens=2))
    assert "seed" not in transport.asked[0][1]


async def test_the_version_is_the_publisher_s_where_the_server_names_none() -> None:
    reply = {k: v for k, v in GOOD.items() if k == "choices"}
    policy = VllmPolicy(Canned(reply), "m")
    first = await policy.sample(PROMPT, SamplingParams(max_tokens=2))
    policy.policy_version = 7
    second = await policy.sample(PROMPT, SamplingParams(max_tokens=2))
    assert (first.policy_version, second.policy_version) == (None, 7)
    assert first.num_cached_tokens is None


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "choices"),
        ({"choices": []}, "return_token_ids"),
        (changed(token_ids=None), "return_token_ids"),
        (changed(token_ids=[]), "return_token_ids"),
        (changed(token_ids=["8", "9"]), "return_token_ids"),
        (changed(token_ids=[8, -1]), "return_token_ids"),
        (changed(logprobs=None), "logprobs"),
        (changed(logprobs__token_logprobs=[-0.5]), "2 token ids came with 1 log-probabilities"),
        (changed(logprobs__token_logprobs=None), "with NoneType"),
        (changed(token_ids=[8, 9, 9], logprobs__token_logprobs=[-1.0] * 3), "3 tokens came back, 2 were asked for"),
        (changed(prompt_token_ids=[5, 6]), "another prompt"),
        (changed(prompt_token_ids=5), "another prompt"),
        (changed(logprobs__tokens=["token_id:8", "token_id:7"]), "token 1 has id 9"),
        (changed(logprobs__tokens=["token_id:8"]), "1 names of tokens"),
        (changed(logprobs__tokens="ab"), "names of tokens"),
        (changed(finish_reason="content_filter"), "content_filter"),
        *[
            (changed(logprobs__token_logprobs=[-0.5, value]), "log-probability of sampled token 1 is")
            for value in (None, math.nan, math.inf, -math.inf, -9999.0, 0.1, "-1")
        ],
    ],
)
async def test_a_reply_that_contradicts_itself(reply: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        await VllmPolicy(Canned(reply), "m").sample(PROMPT, SamplingParams(max_tokens=2))
    assert caught.value.kind == "protocol"


async def test_a_request_that_the_server_aborted() -> None:
    with pytest.raises(PolicyError, match="aborted the request") as caught:
        await VllmPolicy(Canned(changed(finish_reason="abort", token_ids=[])), "m").sample(
            PROMPT, SamplingParams(max_tokens=2)
        )
    assert caught.value.kind == "unavailable"


@pytest.mark.parametrize("reply", [changed(logprobs__tokens=["a", "b"]), changed(prompt_token_ids=None)])
async def test_what_other_servers_leave_out(reply: dict[str, Any]) -> None:
    completion = await VllmPolicy(Canned(reply), "m").sample(PROMPT, SamplingParams(max_tokens=2))
    assert completion.token_ids == (8, 9)


async def test_over_http_the_numbers_are_those_of_the_model_that_sampled() -> None:
    with FakeVllm("m", 64, weight_version=2) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        params = SamplingParams(max_tokens=30, seed=1, stop_token_ids=(3,))
        one, two = [await policy.sample(PROMPT, params) for _ in range(2)]
        await policy.aclose()
        assert one == two
        states = server.invented.states([*PROMPT, *one.token_ids])[len(PROMPT) :]
        assert list(one.logprobs) == [
            server.invented.logprob(s, i) for s, i in zip(states, one.token_ids, strict=False)
        ]
        assert one.finish_reason == ("stop" if one.token_ids[-1] == 3 else "length")
        assert one.policy_version == 2


async def test_a_server_that_returns_no_ids() -> None:
    with FakeVllm("m", 64, returns_ids=False) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        with pytest.raises(PolicyError, match="must honour return_token_ids"):
            await policy.sample(PROMPT, SamplingParams(max_tokens=2))
        await policy.aclose()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("minus_9999", "protocol"),
        ("nan", "protocol"),
        ("null", "protocol"),
        ("short", "protocol"),
        ("wrong_ids", "protocol"),
        ("truncated_json", "protocol"),
        ("html", "protocol"),
        ("http_500", "unavailable"),
        ("stall", "unavailable"),
    ],
)
async def test_a_server_that_misbehaves(fault: str, kind: str) -> None:
    with FakeVllm("m", 64) as server:
        server.fault_after(0, fault)
        policy = VllmPolicy(HttpTransport(server.base_url, retry_deadline_s=0.2), "m", timeout_s=0.5)
        with pytest.raises(PolicyError) as caught:
            await policy.sample(PROMPT, SamplingParams(max_tokens=4, seed=0))
        await policy.aclose()
    assert caught.value.kind == kind


async def test_a_prompt_that_does_not_fit() -> None:
    with FakeVllm("m", 64, max_model_len=8) as server:
        policy = VllmPolicy(HttpTransport(server.base_url), "m")
        with pytest.raises(PolicyError, match="maximum context length") as caught:
            await policy.sample(PROMPT, SamplingParams(max_tokens=6))
        await policy.aclose()
    assert caught.value.kind == "context_overflow"


async def test_the_embedded_engine_takes_what_is_asked() -> None:
    """The engine refuses keys that it does not know, so this request must hold none."""
    pytest.importorskip("torch")
    from distill.serving.embedded import EmbeddedEngine
    from tests.conformance.models import tiny_qwen3

    engine = EmbeddedEngine(tiny_qwen3(), None, name="m")
    policy = VllmPolicy(AsgiTransport(engine.app), "m")
    completion = await policy.sample(PROMPT, SamplingParams(max_tokens=4, seed=0, stop_token_ids=(2,)))
    await engine.aclose()
    assert completion.policy_version == 0
    assert len(completion.token_ids) >= 1


async def test_the_script_is_read_out_and_ends() -> None:
    policy = ScriptedPolicy([[1, 2, 9], [3, 4, 5]], stop_token_ids=[9], logprob=-0.25)
    first = await policy.sample(PROMPT, SamplingParams(max_tokens=10))
    second = await policy.sample(PROMPT, SamplingParams(max_tokens=2))
    assert (first.token_ids, first.logprobs, first.finish_reason) == ((1, 2, 9), (-0.25,) * 3, "stop")
    assert (second.token_ids, second.finish_reason) == ((3, 4), "length")
    with pytest.raises(PolicyError, match="no more turns"):
        await policy.sample(PROMPT, SamplingParams(max_tokens=2))
