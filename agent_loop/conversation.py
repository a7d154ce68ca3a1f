"""Who speaks for the assistant: a model that samples tokens, or one that only speaks messages.

The turn loop (`agent_loop.rollout`) knows neither ids nor servers. It hands new messages to an `Actor` and gets an
assistant message back.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent_loop.parser import ParsedTurn
from agent_loop.renderer import Renderer
from agent_loop.trace import TraceBuilder
from agent_loop.types import Completion, Policy, SamplingParams, TokenTrace, Turn
from envs.types import AssistantMessage, Limits, Message, StopReason
from tools.types import ToolSpec


class OutOfTokens(Exception):
    """The next turn does not fit a token budget; `reason` says which. Nothing was sampled."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sampling:
    """What of `SamplingParams` holds for a whole run."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    top_logprobs: int = 0
    """Candidates to record at each sampled position."""
    max_context: int | None = None
    """Tokens that the model may see; None leaves it to the server to refuse."""


class Actor(Protocol):
    """Plays the assistant in one episode."""

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], limits: Limits, *, key: str, seed: int
    ) -> None:
        """Take in the dialogue before the first turn.

        Args:
            key: the episode's id.
            seed: of the run.
        """
        ...

    async def act(self) -> Turn:
        """The next assistant message.

        Raises:
            OutOfTokens: a budget of tokens is spent.
            PolicyError: the model gave no usable reply.
        """
        ...

    def observe(self, turn: Turn, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Take in the environment's answer to `turn`; returns the messages as the model reads them."""
        ...

    def mask(self, turn: Turn) -> None:
        """Take a turn out of the loss."""
        ...

    def traces(self) -> list[TokenTrace]:
        """What was played so far, token for token; empty before `begin`, and where tokens are not known."""
        ...

    def cut_by(self, turn: Turn) -> StopReason:
        """Which budget cut a turn that did not finish."""
        ...


class TokenActor:
    """An actor whose every token is known: renderer, policy and trace of one episode."""

    def __init__(self, renderer: Renderer, policy: Policy, sampling: Sampling | None = None) -> None:
        self._renderer = renderer
        self._policy = policy
        self._sampling = sampling or Sampling()
        self._builder: TraceBuilder | None = None

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], limits: Limits, *, key: str, seed: int
    ) -> None:
        self._tools = tuple(tools)
        self._limits = limits
        self._key = key
        self._seed = seed
        self._messages = list(self._renderer.clean(messages))
        self._builder = TraceBuilder(self._renderer.render_prompt(self._messages, self._tools))
        self._completion: Completion | None = None
        self._reasoned = False
        self._index = 0

    async def act(self) -> Turn:
        prompt = self._trace.prompt_ids
        params = SamplingParams(
            max_tokens=self._room(len(prompt)),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            top_logprobs=self._sampling.top_logprobs,
            stop_token_ids=self._renderer.stop_token_ids,
            seed=seed_of(self._seed, self._key, self._index),
        )
        began = time.monotonic()
        completion = await self._policy.sample(prompt, params, key=self._key)
        sample_s = time.monotonic() - began
        parsed = self._renderer.parse(completion.token_ids, self._index, completion.finish_reason)
        return self._record(completion, parsed, sample_s)

    def observe(self, turn: Turn, messages: Sequence[Message]) -> tuple[Message, ...]:
        cleaned = self._renderer.clean(messages)
        self._messages.extend(cleaned)
        completion = self._completion
        assert completion is not None, "observe before act"
        extension = self._renderer.extend(
            completion.token_ids, completion.finish_reason, cleaned, has_reasoning=self._reasoned
        )
        if extension is None:
            self._trace.fork(self._renderer.render_prompt(self._messages, self._tools))
            self._reasoned = False
        else:
            self._trace.extend(extension.glue_ids, extension.tool_ids, turn=turn.index)
        return cleaned

    def mask(self, turn: Turn) -> None:
        self._trace.mask_turn(turn.index)

    def traces(self) -> list[TokenTrace]:
        return self._builder.traces() if self._builder is not None else []

    @property
    def _trace(self) -> TraceBuilder:
        assert self._builder is not None, "begin comes first"
        return self._builder

    def _record(self, completion: Completion, parsed: ParsedTurn, sample_s: float, *, written: bool = False) -> Turn:
        trace = self._trace.index
        if written:  # by a person: there is nothing of it to train on
            start, end = self._trace.add_written(completion.token_ids, turn=self._index)
        else:
            start, end = self._trace.add_completion(completion, turn=self._index)
        self._completion = completion
        self._messages.append(parsed.message.to_message())
        self._reasoned |= parsed.message.reasoning is not None
        turn = Turn(
            index=self._index,
            message=parsed.message,
            text=parsed.text,
            trace=trace,
            start=start,
            end=end,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            token_classes=parsed.token_classes,
            sample_s=sample_s,
        )
        self._index += 1
        return turn

    def _room(self, prompt_tokens: int) -> int:
        """Tokens that the next turn may have."""
        room = self._limits.max_turn_tokens
        if self._limits.max_episode_tokens is not None:
            left = self._limits.max_episode_tokens - prompt_tokens
            if left < 1:
                raise OutOfTokens(StopReason.MAX_TOKENS)
            room = min(room, left)
        if self._sampling.max_context is not None:
            left = self._sampling.max_context - prompt_tokens
            if left < 1:
                raise OutOfTokens(StopReason.CONTEXT_OVERFLOW)
            room = min(room, left)
        return room

    def cut_by(self, turn: Turn) -> StopReason:
        assert turn.start is not None
        assert turn.end is not None
        sampled = turn.end - turn.start
        if sampled >= self._limits.max_turn_tokens:
            return StopReason.MAX_TURN_TOKENS
        if self._limits.max_episode_tokens is not None and turn.end >= self._limits.max_episode_tokens:
            return StopReason.MAX_TOKENS
        return StopReason.CONTEXT_OVERFLOW


class MessageModel(Protocol):
    """A model that takes and gives messages (`agent_loop.chat_policy.ChatPolicy`)."""

    async def reply(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, max_tokens: int, turn: int
    ) -> AssistantMessage: ...


@dataclass(slots=True)
class MessageActor:
    """An actor whose tokens are not known: for evaluating models behind message APIs. It leaves no traces, so nothing
    can be trained on its episodes."""

    model: MessageModel
    _messages: list[Message] = field(default_factory=list)
    _tools: tuple[ToolSpec, ...] = ()
    _limits: Limits = field(default_factory=Limits)
    _index: int = 0

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], limits: Limits, *, key: str, seed: int
    ) -> None:
        self._messages, self._tools, self._limits, self._index = list(messages), tuple(tools), limits, 0

    async def act(self) -> Turn:
        began = time.monotonic()
        message = await self.model.reply(
            self._messages, self._tools, max_tokens=self._limits.max_turn_tokens, turn=self._index
        )
        self._messages.append(message.to_message())
        turn = Turn(
            index=self._index,
            message=message,
            text=message.content,
            finish_reason="stop" if message.finished else "length",
            sample_s=time.monotonic() - began,
        )
        self._index += 1
        return turn

    def observe(self, turn: Turn, messages: Sequence[Message]) -> tuple[Message, ...]:
        self._messages.extend(messages)
        return tuple(messages)

    def mask(self, turn: Turn) -> None:
        """There are no tokens to mask."""

    def traces(self) -> list[TokenTrace]:
        return []

    def cut_by(self, turn: Turn) -> StopReason:
        return StopReason.MAX_TURN_TOKENS


def seed_of(run_seed: int, key: str, turn: int) -> int:
    """The seed of one request: it depends on the run, the episode and the turn, and on nothing that happened before,
    so that a lost rollout can be drawn again without moving any other."""
    digest = hashlib.blake2b(f"{run_seed}/{key}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33  # 31 bits: every server takes them
