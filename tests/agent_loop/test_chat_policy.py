"""A model behind a chat API, over a real server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from agent_loop.chat_policy import ChatPolicy, read_call, to_wire
from agent_loop.types import PolicyError
from envs.types import AssistantMessage, Message
from tests.fakes.fake_vllm import FakeVllm
from tools.types import ToolSpec

QUESTION: list[Message] = [{"role": "user", "content": "Who makes Orvenib?"}]
SPEC = ToolSpec(
    name="search",
    description="Search.",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "chatcmpl-tool-x", "type": "function", "function": {"name": name, "arguments": arguments}}


async def ask(reply: Mapping[str, Any], *, messages: list[Message] = QUESTION, turn: int = 0) -> AssistantMessage:
    with FakeVllm("m", 64, chat_replies=[reply]) as server:
        policy = ChatPolicy(server.base_url, "m")
        try:
            return await policy.reply(messages, [SPEC], max_tokens=50, turn=turn)
        finally:
            await policy.aclose()


async def test_an_answer() -> None:
    message = await ask({"content": "HALVEX AG"})
    assert message == AssistantMessage(content="HALVEX AG")


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
async def test_reasoning(key: str) -> None:
    message = await ask({"content": "HALVEX AG", key: "I remember."})
    assert message.reasoning == "I remember."


async def test_calls_get_ids_of_their_turn() -> None:
    message = await ask(
        {"tool_calls": [call("search", '{"query": "Orvenib"}'), call("search", '{"query": "b"}')]}, turn=3
    )
    assert [(c.id, c.name, c.arguments) for c in message.tool_calls] == [
        ("call_3_0", "search", {"query": "Orvenib"}),
        ("call_3_1", "search", {"query": "b"}),
    ]
    assert message.content == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"query": ', "not valid JSON"),
        ("[1]", "must be a JSON object, found list"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
async def test_malformed_arguments_are_data(arguments: str, reason: str) -> None:
    message = await ask({"tool_calls": [call("search", arguments)]})
    [found] = message.tool_calls
    assert found.arguments is None
    assert reason in str(found.parse_error)
    assert arguments in found.raw


def test_no_arguments_and_no_name() -> None:
    assert read_call("list", "", "c").arguments == {}
    assert read_call("", "{}", "c").parse_error == "the call names no tool"


async def test_a_reply_that_was_cut_off() -> None:
    message = await ask({"content": "HAL", "finish_reason": "length"})
    assert not message.finished


async def test_what_is_sent() -> None:
    history: list[Message] = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "secret",
            "tool_calls": [
                {"id": "call_0_0", "type": "function", "function": {"name": "search", "arguments": {"query": "é"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_0_0", "name": "search", "content": "nothing"},
    ]
    with FakeVllm("m", 64, chat_replies=[{"content": "x"}]) as server:
        policy = ChatPolicy(server.base_url, "m", api_key="k", temperature=0.5)
        await policy.reply(history, [SPEC], max_tokens=50, turn=1)
        await policy.aclose()
        [request] = server.received
    assert request.authorization == "Bearer k"
    assert request.payload["tools"] == [SPEC.to_openai()]
    assert (request.payload["temperature"], request.payload["max_completion_tokens"]) == (0.5, 50)
    sent = request.payload["messages"]
    assert sent[0] == QUESTION[0]
    assert "reasoning_content" not in sent[1]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"query": "é"}
    assert sent[2] == {"role": "tool", "tool_call_id": "call_0_0", "content": "nothing"}
    assert (policy.num_prompt_tokens, policy.num_completion_tokens) == (7, 3)


async def test_without_tools_none_are_sent() -> None:
    with FakeVllm("m", 64) as server:
        policy = ChatPolicy(server.base_url, "m")
        await policy.reply(QUESTION, [], max_tokens=5, turn=0)
        await policy.aclose()
        assert "tools" not in server.received[0].payload


def test_arguments_that_are_text_stay_text() -> None:
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call("a", "{}")]}
    assert to_wire(message)["tool_calls"][0]["function"]["arguments"] == "{}"


async def test_what_may_pass_is_retried() -> None:
    with FakeVllm("m", 64, chat_replies=[{"content": "x"}]) as server:
        server.fault_after(0, "http_429", times=1)
        policy = ChatPolicy(server.base_url, "m")
        assert (await policy.reply(QUESTION, [], max_tokens=5, turn=0)).content == "x"
        await policy.aclose()
        assert len(server.received) == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("http_500", "unavailable"), ("stall", "unavailable"), ("truncated_json", "protocol"), ("html", "protocol")],
)
async def test_failures_are_typed(fault: str, kind: str) -> None:
    with FakeVllm("m", 64) as server:
        server.fault_after(0, fault)
        policy = ChatPolicy(server.base_url, "m", timeout_s=0.5, retry_deadline_s=0.2)
        with pytest.raises(PolicyError, match=r"127\.0\.0\.1") as caught:
            await policy.reply(QUESTION, [], max_tokens=5, turn=0)
        await policy.aclose()
    assert caught.value.kind == kind


async def test_a_refusal_is_not_retried() -> None:
    with FakeVllm("m", 64) as server:
        policy = ChatPolicy(server.base_url, "other")
        with pytest.raises(PolicyError, match="does not exist") as caught:
            await policy.reply(QUESTION, [], max_tokens=5, turn=0)
        await policy.aclose()
        assert (caught.value.kind, len(server.received)) == ("rejected", 1)
