"""Messages of verifiers as ours, and the other way round."""

from __future__ import annotations

import json
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.types import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage

from envs.tool_env import EnvSetupError
from envs.types import Message


def opening(task: vf.Task) -> list[Message]:
    """System prompt and prompt of a task.

    Raises:
        EnvSetupError: something in it that is no text.
    """
    system: list[Message] = (
        [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt is not None else []
    )
    return [*system, *ours(task.data.prompt)]


def ours(messages: Any) -> list[Message]:
    """A prompt or a turn of verifiers.

    Raises:
        EnvSetupError: something in it that is no text.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [_ours(m if isinstance(m, dict) else m.model_dump(exclude_none=True)) for m in messages or ()]


def _ours(message: dict[str, Any]) -> Message:
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise EnvSetupError("a message with an image: only text can be played")
        content = "\n".join(part["text"] for part in content)
    said: Message = {"role": message["role"], "content": content}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": json.loads(call["arguments"] or "{}")},
            }
            for call in calls
        ]
    if message["role"] == "tool":
        said["tool_call_id"] = message["tool_call_id"]
        said["name"] = message.get("name") or ""
    return said


def theirs(message: Message) -> Any:
    """One of our messages, typed as verifiers types it."""
    content = message.get("content", "")
    match message["role"]:
        case "system":
            return SystemMessage(content=content)
        case "user":
            return UserMessage(content=content)
        case "tool":
            return ToolMessage(tool_call_id=message["tool_call_id"], content=content, name=message.get("name") or None)
    calls = [
        ToolCall(id=c["id"], name=c["function"]["name"], arguments=json.dumps(c["function"]["arguments"]))
        for c in message.get("tool_calls", ())
    ]
    return AssistantMessage(
        content=content, reasoning_content=message.get("reasoning_content"), tool_calls=calls or None
    )
