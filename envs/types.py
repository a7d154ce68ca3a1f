"""Records of the environment layer. Read first.

Environments speak messages: they never see a token id and never call a model. One instance plays one episode at
a time; concurrent episodes have an instance each.

    Task         one JSONL row
    Message      one chat message, in the OpenAI shape
    AssistantMessage   the action: what the model said, parsed
    Limits       every budget of an episode, each with its own stop reason
    StepOutcome  Gymnasium's five values
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from tools.types import ToolCall, ToolResult


class Message(TypedDict, total=False):
    """A chat message. `role` and `content` are always there."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str
    """Assistant only: the text of the think block, without its tags."""
    tool_calls: list[dict[str, Any]]
    """Assistant only, OpenAI shape: `{"id", "type": "function", "function": {"name", "arguments": dict}}`."""
    tool_call_id: str
    """Tool only: the call that this message answers."""
    name: str
    """Tool only: the tool's name."""


class StopReason(StrEnum):
    """Why an episode ended. `terminated` is True for the first two, `truncated` for all others but `error`."""

    ANSWERED = "answered"
    """A tool declared with `ends_episode` succeeded (`submit_answer`), or a rule of the environment's was met."""
    LAST_TOOL = "last_tool"
    """The assistant answered without a tool call, and `termination_policy` is `last_tool`."""
    MAX_TURNS = "max_turns"
    """`Limits.max_turns` model calls were made."""
    MAX_TURN_TOKENS = "max_turn_tokens"
    """One turn ran into `Limits.max_turn_tokens` before it closed."""
    MAX_TOKENS = "max_tokens"
    """`Limits.max_episode_tokens` (prompt, tool output and sampled tokens) are spent."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The next prompt does not fit the model's context."""
    PARSE_ERROR = "parse_error"
    """More malformed calls than `Limits.max_parse_errors`, or one where `on_parse_error` is `stop`."""
    TOOL_BUDGET = "tool_budget"
    """A tool was called more often than `Limits.max_calls_per_tool` allows it."""
    MAX_TOOL_CALLS = "max_tool_calls"
    """More calls, over all tools, than `Limits.max_tool_calls`."""
    TIMEOUT = "timeout"
    """`Limits.timeout_s` of wall time passed."""
    ERROR = "error"
    """The episode failed: `Episode.error` says where and why."""


TerminationPolicy = Literal["last_tool", "max_turns"]
"""`last_tool`: a reply without a tool call ends the episode. `max_turns`: it does not (the environment answers
with `ToolEnv.on_no_call`), only an `ends_episode` tool or a budget does."""

ParseErrorPolicy = Literal["mask", "train", "stop"]
"""What becomes of a turn with a malformed call. The model gets a corrective message in the first two cases.
`train`: its tokens are trained on like any others (the teacher says how wrong they are). `mask`: they are not.
`stop`: the episode ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Budgets of one episode. None is "no limit". The environment counts turns and calls; token and time budgets
    are counted by the agent loop, which alone sees tokens."""

    max_turns: int = 10
    max_turn_tokens: int = 1024
    """Sampled tokens a turn."""
    max_episode_tokens: int | None = None
    """Length of the whole token sequence: prompt, sampled tokens and tool output."""
    max_tool_calls: int | None = None
    max_calls_per_tool: dict[str, int] = field(default_factory=dict)
    max_tool_output_chars: int = 8000
    """Characters of one tool result that the model sees; the rest is behind the page footer."""
    max_parse_errors: int = 3
    timeout_s: float = 600.0
    termination_policy: TerminationPolicy = "last_tool"
    on_parse_error: ParseErrorPolicy = "train"

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_turn_tokens", "max_tool_output_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} must be at least 1, got {getattr(self, name)}")
        counts = {"max_tool_calls": self.max_tool_calls, "max_parse_errors": self.max_parse_errors}
        counts |= {f"max_calls_per_tool[{name!r}]": count for name, count in self.max_calls_per_tool.items()}
        for name, count in counts.items():
            if count is not None and count < 0:
                raise ValueError(f"Limits.{name} must be 0 or more, got {count}")
        if self.max_episode_tokens is not None and self.max_episode_tokens < 1:
            raise ValueError(f"Limits.max_episode_tokens must be at least 1, got {self.max_episode_tokens}")
        if not self.timeout_s > 0:
            raise ValueError(f"Limits.timeout_s must be more than 0 seconds, got {self.timeout_s}")
        for name, choices in (("termination_policy", TerminationPolicy), ("on_parse_error", ParseErrorPolicy)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"Limits.{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Exactly one row of a task JSONL file (docs/formats.md)."""

    messages: tuple[Message, ...]
    """The dialogue before the first model call; at least one message, the last one from the user."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values for the environment, its tools and its graders: the expected answer, the data set's name."""
    rewards: tuple[str, ...] = ()
    """Names of reward functions to track. Never enter the loss while `adv_tau` is 0."""
    tools: tuple[str, ...] | None = None
    """Names of the tools that this task may use; None is all of the environment's."""
    id: str = ""
    """Unique in its file; a hash of the row's content where the row names none. In a run of several sources, with the
    source's name before it: `math/12`."""
    source: str = ""
    """The source of the run that it was drawn from, where there are several; no part of the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """The action of a `ToolEnv`: one assistant message, parsed."""

    content: str
    """What the model said outside think blocks and calls."""
    reasoning: str | None = None
    """Text of the think block; None if there is none."""
    tool_calls: tuple[ToolCall, ...] = ()
    """In the order in which they were written, malformed ones among them."""
    finished: bool = True
    """False if the turn was cut off by a length limit before it closed."""

    def to_message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments or {}}}
                for c in self.tool_calls
            ]
        return message


class StepOutcome(NamedTuple):
    """What Gymnasium's `step` returns, in its order."""

    observation: tuple[Message, ...]
    """The new messages only: one tool message a call in the order of the calls, or a user message."""
    reward: float
    """Gymnasium wants a float here; it is 0.0 at every step. Rewards are computed by `ToolEnv.verify` after the
    episode, and only where verification is on."""
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    """`stop_reason`: StopReason or None while the episode goes on; `tool_results`: tuple[ToolResult, ...];
    `num_parse_errors`: int, of this step; `budget`: what is left, by name."""


__all__ = [
    "AssistantMessage",
    "Limits",
    "Message",
    "ParseErrorPolicy",
    "StepOutcome",
    "StopReason",
    "Task",
    "TerminationPolicy",
    "ToolCall",
    "ToolResult",
]
