"""Records of the tool layer. Read first.

A tool is a Python function that a model may call by name. This layer knows nothing of episodes, tokens or
models: a `ToolCall` comes in, a `ToolResult` goes out, always one a call and in the order of the calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a model is told of a tool."""

    name: str
    """The function's name, `[A-Za-z_][A-Za-z0-9_]{0,63}`."""
    description: str
    """The docstring's text before its parameter section."""
    parameters: dict[str, Any]
    """JSON schema (draft 2020-12) of the arguments: an object with `additionalProperties: false`."""

    def to_openai(self) -> dict[str, Any]:
        """The shape that chat templates and OpenAI-compatible servers read."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call in an assistant message. A malformed call is data, never an exception and never "no call"."""

    id: str
    """Unique inside the episode, made by whoever parsed the message: `call_<turn>_<index>`."""
    name: str
    """Name of the tool; "" where not even that could be read."""
    arguments: dict[str, Any] | None
    """Arguments by parameter name; None if and only if `parse_error` is set."""
    raw: str
    """The call as the model wrote it."""
    parse_error: str | None = None
    """Why the call could not be read, in words for the model; None if it could."""

    def __post_init__(self) -> None:
        if (self.arguments is None) != (self.parse_error is not None):
            raise ValueError("ToolCall: arguments is None exactly when parse_error is set")


class ToolErrorKind(StrEnum):
    """Why a call gave no result. The first word of every error text that a model reads."""

    MALFORMED_CALL = "malformed_call"
    """The call could not be parsed."""
    UNKNOWN_TOOL = "unknown_tool"
    """No tool of that name in this environment."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """Missing, extra or of the wrong type. Nothing is coerced."""
    TIMEOUT = "timeout"
    """The tool's deadline passed; its task was cancelled."""
    NOT_FOUND = "not_found"
    """What was asked for does not exist (a page, a record, a replay entry)."""
    BLOCKED = "blocked"
    """A rule forbids it: the guard, a list of domains, robots.txt, or that only URLs that were seen may be opened."""
    EXECUTION = "execution"
    """The tool raised `ToolFailure` or an exception."""
    BUDGET = "budget"
    """A budget of calls is spent."""
    CANCELLED = "cancelled"
    """The episode ended before the call ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolError:
    kind: ToolErrorKind
    message: str
    """At most 500 characters, for the model: no traceback, no path, no secret."""


class ToolFailure(Exception):
    """Raised by a tool to tell the model that the call failed. Any other exception is reported to the model by
    its class name only and counted as `execution`."""

    def __init__(self, message: str, kind: ToolErrorKind = ToolErrorKind.EXECUTION) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What one call gave."""

    call_id: str
    name: str
    content: str
    """The text that goes to the model: cleaned, and cut to the output limit with a `[page 1/5]` footer. For a
    failed call the error in words."""
    error: ToolError | None = None
    ends_episode: bool = False
    """True if the call succeeded and its tool is declared with `ends_episode`; `ToolOutput` may say otherwise."""
    truncated_chars: int = 0
    """Characters of the full output that are not in `content`."""
    duration_s: float = field(default=0.0, compare=False)
    """Wall time of the call, monotonic clock. Two results are equal whatever time they took."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values for the episode file that the model never sees (the URL that was read, its content hash)."""
