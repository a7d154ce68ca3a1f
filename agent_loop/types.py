"""Records of the agent loop, the one seam of messages and tokens. Read first.

    prompt   assistant  glue tool        assistant
    P P P P  A A A A    G    T T T T G   A A A        token_ids[L]
    . . . .  # # # #    .    . . . . .   # # #        loss_mask[L]

For every turn, `prompt_ids + completion.token_ids` is a prefix of a trace: what was sampled is what is trained,
id for id. Nothing is ever decoded and encoded again. A prompt that cannot extend its trace opens a new one.

Log-probabilities are natural logarithms. `None` is "not computed"; 0.0 is a number (probability one) and never a
default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from envs.types import AssistantMessage, Message, StopReason, Task
from tools.types import ToolResult

SCHEMA_VERSION = 1
"""Of the episode JSONL (docs/formats.md, agent_loop/episode.schema.json)."""

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a stop id was sampled and is the last of `token_ids`. `length`: `max_tokens` were sampled. `abort`: the
server gave up on the request."""


class SegmentSource(StrEnum):
    PROMPT = "prompt"
    """The dialogue before the first model call, as the chat template renders it, with the generation prompt."""
    ASSISTANT = "assistant"
    """Exactly the ids that the model sampled in one turn, the close token included if it was sampled."""
    TOOL = "tool"
    """What the environment answered: tool results and user messages, in their template frame, with the next
    generation prompt."""
    GLUE = "glue"
    """Template tokens that belong to no message's text: what follows a sampled close token, a synthetic close."""


class TokenClass(StrEnum):
    """What a sampled token is part of; for metrics only."""

    THINK = "think"
    CALL = "call"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a completion is drawn. The defaults are the only on-policy ones: the model's own distribution."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """Of this one request; drawn from (run seed, step, task, sample, turn)."""
    top_logprobs: int = 0
    """K: also return the K likeliest tokens at each sampled position, with their log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a policy sampled in one turn."""

    token_ids: tuple[int, ...]
    """[N] ids as sampled, the stop id included if one was sampled."""
    logprobs: tuple[float, ...]
    """[N] log-probability under the distribution that each id was drawn from."""
    finish_reason: FinishReason
    policy_version: int | None
    """The oldest version of the weights that sampled a token of it; None where the server does not say."""
    token_versions: tuple[int | None, ...] = ()
    """[N] version of each token; empty: all are of `policy_version`."""
    topk: tuple[tuple[tuple[int, float], ...], ...] = ()
    """[N][K] the likeliest (id, log-probability), best first; empty where they were not asked for."""
    num_cached_tokens: int | None = None
    """Prompt tokens that the server took from its prefix cache."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"Completion: {len(self.token_ids)} token ids but {len(self.logprobs)} log-probabilities")
        for name, values in (("versions", self.token_versions), ("rows of candidates", self.topk)):
            if values and len(values) != len(self.token_ids):
                raise ValueError(f"Completion: {len(self.token_ids)} token ids but {len(values)} {name}")
        for i, logprob in enumerate(self.logprobs):
            if not math.isfinite(logprob) or logprob > 1e-4:
                raise ValueError(f"Completion: log-probability {logprob!r} of token {i} is not a finite number <= 0")


class Policy(Protocol):
    """A model that samples: token ids in, token ids out. Raises `PolicyError`."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        """Draw one completion. `key` names the episode, for servers that pin an episode to a replica."""
        ...

    async def aclose(self) -> None: ...


class PolicyError(Exception):
    """The student's server gave no usable completion. `kind` is `unavailable` (retried until the deadline passed),
    `protocol` (a reply that contradicts itself), `rejected` (4xx) or `context_overflow`."""

    def __init__(self, message: str, kind: Literal["unavailable", "protocol", "rejected", "context_overflow"]) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens of one origin."""

    start: int
    end: int
    """Exclusive."""
    source: SegmentSource
    turn: int
    """The model call that this segment follows (`tool`, `glue`) or is (`assistant`); -1 for `prompt`."""


@dataclass(slots=True, kw_only=True)
class TopK:
    """The K likeliest next tokens at some positions: those of the loss mask by the teacher, sampled ones by the
    student."""

    token_ids: list[list[int] | None]
    """[L][K] None where not scored."""
    logprobs: list[list[float] | None]
    """[L][K]"""


@dataclass(slots=True, kw_only=True)
class TokenTrace:
    """One token sequence of an episode. Position i holds the log-probability of token i given tokens < i."""

    token_ids: list[int]
    """[L]"""
    loss_mask: list[bool]
    """[L] True on the tokens to train on: sampled ones only."""
    sampling_logprobs: list[float | None]
    """[L] by the student's server, at sampling; None where not sampled, and everywhere in a demonstration."""
    segments: list[Segment]
    """Tile [0, L) in order, none of them empty."""
    teacher_logprobs: list[float | None] | None = None
    """[L] by the teacher; None where not scored. None as a whole: the teacher was not asked."""
    teacher_topk: TopK | None = None
    """For the losses that need more than the sampled token."""
    policy_versions: list[int | None] | None = None
    """[L] version of the weights that sampled each token; None where not sampled or not said. None as a whole: never
    said."""
    sampling_topk: TopK | None = None
    """The student's own candidates at sampling, at sampled positions; None where they were not asked for."""

    def __post_init__(self) -> None:
        self.check()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return sum(self.loss_mask)

    def check(self) -> None:
        """Invariants 1, 2 and 4 of docs/concepts.md.

        Raises:
            ValueError: naming the array or segment that breaks one.
        """
        length = len(self.token_ids)
        arrays: dict[str, Sequence[Any] | None] = {
            "loss_mask": self.loss_mask,
            "sampling_logprobs": self.sampling_logprobs,
            "teacher_logprobs": self.teacher_logprobs,
            "teacher_topk.token_ids": self.teacher_topk.token_ids if self.teacher_topk else None,
            "teacher_topk.logprobs": self.teacher_topk.logprobs if self.teacher_topk else None,
            "policy_versions": self.policy_versions,
            "sampling_topk.token_ids": self.sampling_topk.token_ids if self.sampling_topk else None,
            "sampling_topk.logprobs": self.sampling_topk.logprobs if self.sampling_topk else None,
        }
        for name, values in arrays.items():
            if values is not None and len(values) != length:
                raise ValueError(f"TokenTrace: {name} has {len(values)} entries for {length} tokens")
        position = 0
        for segment in self.segments:
            if segment.start != position or segment.end <= segment.start:
                raise ValueError(f"TokenTrace: {segment} does not continue at {position}")
            if segment.source is not SegmentSource.ASSISTANT and any(self.loss_mask[segment.start : segment.end]):
                raise ValueError(f"TokenTrace: loss_mask is set inside {segment}")
            position = segment.end
        if position != length:
            raise ValueError(f"TokenTrace: segments end at {position}, tokens at {length}")
        for name in ("sampling_logprobs", "teacher_logprobs"):
            values = getattr(self, name)
            for i, value in enumerate(values or ()):
                if value is not None and not (math.isfinite(value) and value <= 1e-4):
                    raise ValueError(f"TokenTrace: {name}[{i}] is {value!r}, not a finite number <= 0")
        sampled = any(value is not None for value in self.sampling_logprobs)  # else a demonstration, for `distill.sft`
        for i, trained in enumerate(self.loss_mask):
            if trained and sampled and self.sampling_logprobs[i] is None:
                raise ValueError(f"TokenTrace: token {i} is to be trained on but has no sampling log-probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSpan:
    """Sampled tokens [start, end) of a turn, relative to its completion, and what they are part of."""

    token_class: TokenClass
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class Turn:
    """One model call and the environment's reply to it."""

    index: int
    message: AssistantMessage
    """What was sampled, parsed."""
    text: str
    """The sampled ids decoded, special tokens visible; for people, never encoded again."""
    observation: tuple[Message, ...] = ()
    """What the environment answered, as the student read it (cleaned); empty after the last turn."""
    tool_results: tuple[ToolResult, ...] = ()
    trace: int | None = None
    """Index into `Episode.traces`; None where the model only speaks messages."""
    start: int | None = None
    """First position of this turn's sampled tokens in that trace."""
    end: int | None = None
    """Exclusive."""
    finish_reason: FinishReason = "stop"
    policy_version: int | None = None
    token_classes: tuple[ClassSpan, ...] = ()
    num_parse_errors: int = 0
    sample_s: float = 0.0
    """Wall time of the model call."""
    env_s: float = 0.0
    """Wall time of the environment's step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeError:
    """Why an episode failed. Failures of one episode are data; they never reach its siblings."""

    boundary: Literal["student", "teacher", "tool", "env", "data", "renderer", "worker"]
    kind: str
    """Exception class, or the `kind` of a typed error."""
    message: str
    """At most 2,000 characters."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """One run of an environment."""

    id: str
    """`<step>/<task id>/<sample>`: a content key, so that writing it twice is harmless."""
    env_id: str
    task: Task
    turns: list[Turn]
    traces: list[TokenTrace]
    """More than one only where a prompt could not extend its predecessor. Empty where no ids were seen."""
    stop_reason: StopReason
    reward: float | None = None
    """None: not verified. Never a default."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Tracked reward functions by name."""
    error: EpisodeError | None = None
    policy_version: int | None = None
    """The oldest version that sampled a token of it."""
    seed: int | None = None
    timing: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: `sample`, `env`, `total`, `score`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values of the environment (page store manifest, sample index)."""
    schema_version: int = SCHEMA_VERSION

    @property
    def num_sampled(self) -> int:
        """Sampled tokens over all traces."""
        return sum(s.end - s.start for t in self.traces for s in t.segments if s.source is SegmentSource.ASSISTANT)
