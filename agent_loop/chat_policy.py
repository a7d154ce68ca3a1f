"""A model behind any OpenAI-compatible chat API: messages in, an assistant message out.

For evaluation only: such an API tells neither the ids that it sampled nor, for given tokens, their log-probabilities,
so nothing can be trained on what it says.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any, Literal

from agent_loop.transport import OVERFLOW_WORDS, RETRIED
from agent_loop.types import PolicyError
from envs.types import AssistantMessage, Message
from tools.types import ToolCall, ToolSpec

NO_KEY = "none"
"""Sent where no key was given: the client wants one, servers of one's own do not."""
REASONING_KEYS = ("reasoning", "reasoning_content")
"""Where servers put the text of the think block: vLLM since 0.11, and before."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0


class ChatPolicy:
    """A `MessageModel` (`agent_loop.conversation`) over `openai.AsyncOpenAI`.

    Args:
        base_url: of the API, with its `/v1`.
        api_key: None for a server that asks for none. The environment's OPENAI_API_KEY is not read.
        timeout_s: of one reply, retries included.
        retry_deadline_s: no retry begins later than this after the first try.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        temperature: float = 1.0,
        timeout_s: float = 600.0,
        retry_deadline_s: float = 60.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.model = model
        self._api_key = api_key or NO_KEY
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._retry_deadline_s = retry_deadline_s
        self._client: Any = None
        self.num_prompt_tokens = 0
        """Of all replies so far, as the API counts them: what is paid for."""
        self.num_completion_tokens = 0

    async def reply(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, max_tokens: int, turn: int
    ) -> AssistantMessage:
        """The next assistant message.

        Args:
            turn: number of the model call in its episode; the calls' ids are made of it.

        Raises:
            PolicyError: the API is gone, refuses, or answers with no message.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [to_wire(message) for message in messages],
            "max_completion_tokens": max_tokens,
            "temperature": self._temperature,
        }
        if tools:
            request["tools"] = [spec.to_openai() for spec in tools]
        completion = await self._create(request)
        usage = getattr(completion, "usage", None)
        self.num_prompt_tokens += getattr(usage, "prompt_tokens", None) or 0
        self.num_completion_tokens += getattr(usage, "completion_tokens", None) or 0
        try:
            choice = completion.choices[0]
            message, finish = choice.message, choice.finish_reason
            calls = tuple(
                read_call(call.function.name, call.function.arguments, f"call_{turn}_{index}")
                for index, call in enumerate(message.tool_calls or ())
            )
            content = message.content or ""
        except (AttributeError, IndexError, TypeError) as error:
            raise PolicyError(f"{self.base_url} answered with no chat completion: {error}", "protocol") from error
        extra = message.model_extra or {}
        reasoning = next((extra[key] for key in REASONING_KEYS if isinstance(extra.get(key), str)), None)
        return AssistantMessage(content=content, reasoning=reasoning, tool_calls=calls, finished=finish != "length")

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _create(self, request: dict[str, Any]) -> Any:
        """One completion, with the retries of `agent_loop.transport`; the client's own are off, they know no
        deadline."""
        import openai

        if self._client is None:
            self._client = openai.AsyncOpenAI(base_url=self.base_url, api_key=self._api_key, max_retries=0)
        begun = time.monotonic()
        pause = FIRST_PAUSE_S
        while True:
            left = self._timeout_s - (time.monotonic() - begun)
            try:
                return await self._client.chat.completions.create(**request, timeout=max(left, 0.001))
            except openai.APIStatusError as error:
                status = error.status_code
                failure = PolicyError(f"{self.base_url} answered {status}: {error.message[:500]}", _kind(status, error))
                cause: Exception = error
            except openai.APIConnectionError as error:  # a time-out is one
                failure = PolicyError(f"{self.base_url} gave no answer: {error} ({error.__cause__})", "unavailable")
                cause = error
            except (openai.OpenAIError, ValueError) as error:
                raise PolicyError(f"{self.base_url} answered with no chat completion: {error}", "protocol") from error
            wait = random.uniform(0, pause)
            late = time.monotonic() - begun + wait >= min(self._timeout_s, self._retry_deadline_s)
            if failure.kind != "unavailable" or late:
                raise failure from cause
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _kind(status: int, error: Exception) -> Literal["unavailable", "rejected", "context_overflow"]:
    if status in RETRIED or status >= 500:
        return "unavailable"
    overflow = any(words in str(error) for words in (*OVERFLOW_WORDS, "context_length_exceeded"))
    return "context_overflow" if status == 400 and overflow else "rejected"


def to_wire(message: Message) -> dict[str, Any]:
    """A message as the API wants it: arguments as a string of JSON, the think block left out (most APIs refuse it)."""
    wire: dict[str, Any] = {k: v for k, v in message.items() if k not in ("reasoning_content", "name")}
    if calls := message.get("tool_calls"):
        wire["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in calls
        ]
    return wire


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def read_call(name: str, arguments: str, call_id: str) -> ToolCall:
    """A call of the API's; arguments that are no JSON object make a malformed call, never an exception."""
    raw = f"{name}({arguments})"
    if not name:
        return ToolCall(id=call_id, name="", arguments=None, raw=raw, parse_error="the call names no tool")
    try:
        value = json.loads(arguments or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = f"the arguments are not valid JSON: {error}"[:300]
        return ToolCall(id=call_id, name=name, arguments=None, raw=raw, parse_error=reason)
    if not isinstance(value, dict):
        reason = f"the arguments must be a JSON object, found {type(value).__name__}"
        return ToolCall(id=call_id, name=name, arguments=None, raw=raw, parse_error=reason)
    return ToolCall(id=call_id, name=name, arguments=value, raw=raw)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
