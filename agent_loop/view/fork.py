"""What if turn k had been another? Plays an episode again up to there, and on from there otherwise.

The turns before k are not sampled: the stored messages are handed to a fresh environment, and their ids,
log-probabilities and template tokens are taken from the stored trace, so that the prompt of turn k is the stored one,
id for id. The environment must answer as it did; the first answer that differs ends the attempt (`ReplayDiffers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent_loop.conversation import Sampling, TokenActor
from agent_loop.parser import ParsedTurn
from agent_loop.rollout import EpisodeJob, run_episode
from agent_loop.trace import TraceBuilder
from agent_loop.types import Completion, Episode, Policy, SegmentSource, TokenTrace, Turn
from envs.types import Limits, Message, StopReason
from tools.types import ToolResult, ToolSpec

if TYPE_CHECKING:
    from agent_loop.renderer import Renderer
    from envs.tool_env import ToolEnv

_OVERFLOW = StopReason.CONTEXT_OVERFLOW
_ID = re.compile(r"(\d+)/(.*)/(\d+)", re.DOTALL)
_FORK = re.compile(r"(#fork-\d+)+$")


class ForkError(Exception):
    """The episode cannot be forked there; the message says why."""


class ReplayDiffers(ForkError):
    """The environment does not answer as it did; the message names the first call that differs."""


class ForkActor(TokenActor):
    """Plays the stored turns before `turn`, there the edited text if there is one, and then what is sampled.

    Args:
        policy: None: nothing is sampled; the environment's limits end the episode before it is asked for.
        key: of the requests' seeds.
    """

    problem: ForkError | None = None
    """Why the attempt is worth nothing; the episode then is none."""

    def __init__(
        self,
        original: Episode,
        turn: int,
        edited_text: str | None,
        renderer: Renderer,
        policy: Policy | None,
        sampling: Sampling,
        *,
        key: str,
    ) -> None:
        super().__init__(renderer, policy or _Nobody(), sampling)
        self._original, self._turn, self._edited, self._own_key = original, turn, edited_text, key

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], limits: Limits, *, key: str, seed: int
    ) -> None:
        if tuple(map(dict, messages)) != tuple(map(dict, self._original.task.messages)):
            self.problem = ReplayDiffers("the environment opens the task with other messages than it did")
            raise self.problem
        super().begin(messages, tools, limits, key=self._own_key, seed=seed)
        self._builder = TraceBuilder(_prompt_of(self._original.traces[0]))

    async def act(self) -> Turn:
        if self._index < self._turn:
            return self._stored(self._original.turns[self._index])
        if self._index == self._turn and self._edited is not None:
            return self._written(self._edited)
        return await super().act()

    def observe(self, turn: Turn, messages: Sequence[Message]) -> tuple[Message, ...]:
        if turn.index >= self._turn:
            return super().observe(turn, messages)
        stored = self._original.turns[turn.index]
        cleaned = self._renderer.clean(messages)
        problem = difference(stored, turn.tool_results, cleaned)
        if problem is not None:
            self.problem = ReplayDiffers(f"turn {turn.index}: {problem}")
            raise self.problem
        self._messages.extend(cleaned)
        self._follow(stored, self._original.turns[turn.index + 1])
        return cleaned

    def traces(self) -> list[TokenTrace]:
        """The teacher's numbers of what was taken over are taken over too."""
        traces = super().traces()
        first = self._original.turns[self._turn]
        assert first.trace is not None
        for index, (trace, stored) in enumerate(zip(traces, self._original.traces, strict=False)):
            shared = _start(first) if index == first.trace else len(stored) if index < first.trace else 0
            if stored.teacher_logprobs is not None and len(trace) >= shared > 0:
                trace.teacher_logprobs = [*stored.teacher_logprobs[:shared], *[None] * (len(trace) - shared)]
        return traces

    def _stored(self, turn: Turn) -> Turn:
        assert turn.trace is not None
        trace, start, end = self._original.traces[turn.trace], _start(turn), _end(turn)
        logprobs = trace.sampling_logprobs[start:end]
        parsed = ParsedTurn(message=turn.message, token_classes=turn.token_classes, text=turn.text)
        if any(logprob is None for logprob in logprobs):  # somebody's edit, in a fork of a fork
            return self._record_written(trace.token_ids[start:end], parsed, turn.finish_reason == "stop")
        versions = trace.policy_versions[start:end] if trace.policy_versions is not None else ()
        topk: list[tuple[tuple[int, float], ...]] = []
        if trace.sampling_topk is not None:
            rows = zip(trace.sampling_topk.token_ids[start:end], trace.sampling_topk.logprobs[start:end], strict=True)
            topk = [tuple(zip(ids or (), values or (), strict=True)) for ids, values in rows]
        completion = Completion(
            token_ids=tuple(trace.token_ids[start:end]),
            logprobs=tuple(logprob for logprob in logprobs if logprob is not None),
            finish_reason=turn.finish_reason,
            policy_version=turn.policy_version,
            token_versions=tuple(versions),
            topk=tuple(topk),
        )
        return self._record(completion, parsed, turn.sample_s)

    def _written(self, text: str) -> Turn:
        ids = self._renderer.encode(text)
        close = self._renderer.close_id
        while ids and ids[-1] == close:
            ids.pop()
        problem = None
        if not ids:
            problem = "the edited text is empty"
        elif set(ids) & set(self._renderer.stop_token_ids):
            problem = "the edited text ends the turn in its middle: it holds a token at which a model stops"
        elif len(ids) + 1 > (room := self._room(len(self._trace.prompt_ids))):
            problem = f"the edited text has {len(ids) + 1} tokens, and the turn room for {room}"
        if problem is not None:
            self.problem = ForkError(problem)
            raise self.problem
        ids = [*ids, close]
        return self._record_written(ids, self._renderer.parse(ids, self._index, "stop"), True)

    def _record_written(self, ids: Sequence[int], parsed: ParsedTurn, finished: bool) -> Turn:
        completion = Completion(  # only its ids are read: nobody sampled it, and the trace says so
            token_ids=tuple(ids),
            logprobs=(0.0,) * len(ids),
            finish_reason="stop" if finished else "length",
            policy_version=None,
        )
        return self._record(completion, parsed, 0.0, written=True)

    def _follow(self, turn: Turn, following: Turn) -> None:
        """The stored tokens between two turns, or the stored prompt of the trace that the next one opened."""
        assert turn.trace is not None
        assert following.trace is not None
        stored = self._original.traces[turn.trace]
        if following.trace != turn.trace:
            self._trace.fork(_prompt_of(self._original.traces[following.trace]))
            self._reasoned = False
            return
        between = [s for s in stored.segments if _end(turn) <= s.start < _start(following)]
        glue, tool = (
            [i for s in between if s.source is source for i in stored.token_ids[s.start : s.end]]
            for source in (SegmentSource.GLUE, SegmentSource.TOOL)
        )
        self._trace.extend(glue, tool, turn=turn.index)


class _Nobody:
    """Where nothing is to be sampled."""

    async def sample(self, prompt_ids: Sequence[int], params: Any, *, key: str = "") -> Completion:
        raise AssertionError("nothing is sampled in a fork without a model")

    async def aclose(self) -> None:
        pass


def difference(stored: Turn, results: Sequence[ToolResult], observation: Sequence[Message]) -> str | None:
    """The first call of a turn that is answered otherwise than it was, in words; None if all is as it was."""
    for number, (old, new) in enumerate(zip(stored.tool_results, results, strict=False)):
        was, now = (_seen(result) for result in (old, new))
        for name, value in was.items():
            if now[name] != value:
                return (
                    f"call {number} ({old.name}) is answered otherwise than it was: {name} was {_short(value)}, "
                    f"is {_short(now[name])}"
                )
    if len(stored.tool_results) != len(results):
        return f"{len(results)} calls are answered, and {len(stored.tool_results)} were"
    if [dict(message) for message in stored.observation] != [dict(message) for message in observation]:
        return "the environment's messages are not what they were"
    return None


def _seen(result: ToolResult) -> dict[str, Any]:
    error = result.error
    return {
        "name": result.name,
        "error": None if error is None else f"{error.kind.value}: {error.message}",
        "ends_episode": result.ends_episode,
        "content": result.content,
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."


def _prompt_of(trace: TokenTrace) -> list[int]:
    first = trace.segments[0]
    if first.source is not SegmentSource.PROMPT:
        raise ForkError("a trace of this episode does not begin with its prompt")
    return trace.token_ids[: first.end]


def _start(turn: Turn) -> int:
    assert turn.start is not None
    return turn.start


def _end(turn: Turn) -> int:
    assert turn.end is not None
    return turn.end


def check(original: Episode, turn: int, renderer: Renderer) -> EpisodeJob:
    """Whether the episode can be forked at `turn`; the job that it was.

    Raises:
        ForkError: no, and why.
    """
    if not 0 <= turn < len(original.turns):
        raise ForkError(f"there is no turn {turn}: the episode has {len(original.turns)}")
    found = _ID.fullmatch(_FORK.sub("", original.id))
    if found is None or found[2] != original.task.id or original.seed is None:
        raise ForkError("the episode's id is not <step>/<task>/<sample>, or its seed is not known")
    for index, played in enumerate(original.turns[: turn + 1]):
        if played.index != index or played.trace is None or played.start is None or played.end is None:
            raise ForkError("the tokens of this episode are not known: only messages were exchanged")
        trace = original.traces[played.trace] if 0 <= played.trace < len(original.traces) else None
        own = [s for s in trace.segments if s.source is SegmentSource.ASSISTANT and s.turn == index] if trace else []
        if trace is None or [(s.start, s.end) for s in own] != [(played.start, played.end)]:
            raise ForkError(f"turn {index} is not where the trace has it")
        if renderer.decode(trace.token_ids[played.start : played.end]) != played.text:
            raise ForkError(f"turn {index} was sampled with another tokenizer than {renderer.tokenizer.name_or_path}")
    return EpisodeJob(task=original.task, step=int(found[1]), sample_index=int(found[3]), seed=original.seed)


async def fork(
    original: Episode,
    turn: int,
    *,
    fork_id: str,
    env: ToolEnv,
    renderer: Renderer,
    policy: Policy | None = None,
    sampling: Sampling | None = None,
    edited_text: str | None = None,
    how: str = "",
) -> Episode:
    """Play the fork to its end.

    Args:
        env: a fresh one, made as that of the original.
        policy: None: the edited turn is the last.
        edited_text: of turn `turn`, as the model would write it, control tokens of calls included.

    Raises:
        ReplayDiffers: the environment answers a stored turn otherwise than it did.
        ForkError: the episode or the text is not fit for it.
    """
    if policy is None and edited_text is None:
        raise ForkError("there is neither an edited text nor a model")
    job = check(original, turn, renderer)
    if policy is None:
        env.limits = replace(env.limits, max_turns=turn + 1)
    actor = ForkActor(original, turn, edited_text, renderer, policy, sampling or Sampling(), key=fork_id)
    episode = await run_episode(job, env, actor)
    if actor.problem is not None:
        raise actor.problem
    if episode.error is not None and len(episode.turns) <= turn:
        raise ForkError(f"{episode.error.boundary}: {episode.error.kind}: {episode.error.message}")
    if len(episode.turns) <= turn:
        last = len(episode.turns) - 1
        if last >= 0 and episode.stop_reason not in (StopReason.TIMEOUT, StopReason.MAX_TOKENS, _OVERFLOW):
            raise ReplayDiffers(f"turn {last} ends the episode now ({episode.stop_reason.value}), and did not")
        raise ForkError(f"turn {turn} was not reached: {episode.stop_reason.value}")
    episode.id = fork_id
    episode.metadata = episode.metadata | {"fork": {"of": original.id, "turn": turn, "how": how}}
    return episode
