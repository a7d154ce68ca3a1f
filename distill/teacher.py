"""Teacher scores: the log-probability that a served model gives to each token that the student sampled.

One request a finished trace, ids in and numbers out, looked up by id. A score that cannot be had is a `TeacherError`,
never a number: the episode is dropped from the step and counted, and the run stops when too many are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from agent_loop.renderer import Renderer
from agent_loop.scoring import PromptScores, ScoringError, prompt_logprobs
from agent_loop.transport import Transport
from agent_loop.types import Episode, TokenTrace, TopK
from distill.types import TeacherError, TeacherScore
from envs.types import Message, Task
from tools.types import ToolSpec


class TokenBudget:
    """A semaphore of tokens: at most `limit` are in flight at once, first come first served. A single request
    larger than the limit waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, tokens: int) -> AsyncIterator[None]:
        tokens = min(tokens, self._limit)
        if self._waiting or self._used + tokens > self._limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((tokens, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release(tokens)
                else:
                    self._waiting.remove((tokens, turn))
                raise
        else:
            self._used += tokens
        try:
            yield
        finally:
            self._release(tokens)

    def _release(self, tokens: int) -> None:
        self._used -= tokens
        while self._waiting and self._used + self._waiting[0][0] <= self._limit:
            next_tokens, turn = self._waiting.popleft()
            if not turn.done():
                self._used += next_tokens
                turn.set_result(None)


class HttpTeacher:
    """A `TeacherScorer` over `/v1/completions` with `prompt_logprobs`.

    Args:
        transport: to the teacher's server, or to an embedded engine in process.
        model: the name that the server knows it by.
        top_k: candidates a position, for the `topk` loss; 0 is the sampled token alone.
        max_tokens_in_flight: over all requests at once; long prompts cost the server memory.
        renderer: only needed with `system_prompt`.
        system_prompt: privileged context that the student never sees, put before the task's own system message
            (context distillation, as in SDFT, arXiv:2601.19897).
        tool_specs: the environment's tools, in the order in which prompts name them; only needed with `system_prompt`.
    """

    def __init__(
        self,
        transport: Transport,
        model: str,
        *,
        top_k: int = 0,
        max_tokens_in_flight: int = 131_072,
        timeout_s: float = 600.0,
        renderer: Renderer | None = None,
        system_prompt: str | None = None,
        tool_specs: Sequence[ToolSpec] = (),
    ) -> None:
        if system_prompt is not None and renderer is None:
            raise ValueError("HttpTeacher: a system_prompt needs the renderer that made the student's prompt")
        self._transport = transport
        self._model = model
        self._top_k = top_k
        self._budget = TokenBudget(max_tokens_in_flight)
        self._timeout_s = timeout_s
        self._renderer = renderer
        self._system_prompt = system_prompt
        self._tool_specs = tuple(tool_specs)
        self.num_tokens = 0
        """Tokens sent for scoring since the start, contexts included: the teacher's cost."""

    async def score(self, episode: Episode) -> Sequence[TeacherScore]:
        """Score all traces of an episode at once; see `TeacherScorer`."""
        return await asyncio.gather(*(self._score_trace(episode.task, trace) for trace in episode.traces))

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _score_trace(self, task: Task, trace: TokenTrace) -> TeacherScore:
        if not any(trace.loss_mask):
            return TeacherScore(logprobs=[None] * len(trace))
        context, skipped = self._context(task, trace)
        # Nothing after the last trained token is needed.
        end = len(trace) - trace.loss_mask[::-1].index(True)
        ids = [*context, *trace.token_ids[skipped:end]]
        async with self._budget.take(len(ids)):
            self.num_tokens += len(ids)
            try:
                scores = await prompt_logprobs(
                    self._transport, self._model, ids, top_k=self._top_k, timeout_s=self._timeout_s
                )
            except ScoringError as error:
                raise TeacherError(str(error), error.kind) from error
        return align(trace, scores, shift=len(context) - skipped, top_k=self._top_k)

    def _context(self, task: Task, trace: TokenTrace) -> tuple[list[int], int]:
        """The ids that replace the trace's first ones for the teacher, and how many they replace."""
        if self._system_prompt is None or self._renderer is None:
            return [], 0
        tools = [tool for tool in self._tool_specs if task.tools is None or tool.name in task.tools]
        student = self._renderer.render_prompt(self._renderer.clean(task.messages), tools)
        privileged = with_system_prompt(task.messages, self._system_prompt)
        teacher = self._renderer.render_prompt(self._renderer.clean(privileged), tools)
        shared = 0
        while shared < min(len(student), len(teacher)) and student[-1 - shared] == teacher[-1 - shared]:
            shared += 1
        head = len(student) - shared
        if trace.token_ids[:head] != student[:head]:
            raise TeacherError(
                "the trace does not begin with the task's prompt, so the teacher's prompt cannot take its place",
                "protocol",
            )
        return teacher[: len(teacher) - shared], head


def with_system_prompt(messages: Sequence[Message], system_prompt: str) -> tuple[Message, ...]:
    """The dialogue with `system_prompt` before its system message, or as one if it has none."""
    if messages and messages[0]["role"] == "system":
        own: Message = {"role": "system", "content": f"{system_prompt}\n\n{messages[0]['content']}"}
        return (own, *messages[1:])
    return ({"role": "system", "content": system_prompt}, *messages)


def align(trace: TokenTrace, scores: PromptScores, *, shift: int, top_k: int) -> TeacherScore:
    """Lay the server's numbers on the trace: entry `i + shift` of the reply belongs to token i.

    Raises:
        TeacherError: if a token of the loss mask has no number.
    """
    logprobs: list[float | None] = [None] * len(trace)
    topk = TopK(token_ids=[None] * len(trace), logprobs=[None] * len(trace)) if top_k else None
    for i, trained in enumerate(trace.loss_mask):
        if not trained:
            continue
        logprob = scores.logprobs[i + shift]
        if logprob is None:
            raise TeacherError(f"the teacher's reply has no log-probability for token {i}", "protocol")
        logprobs[i] = logprob
        if topk is not None:
            candidates = scores.topk[i + shift] if scores.topk is not None else None
            if candidates is None or len(candidates) < top_k:
                raise TeacherError(
                    f"the teacher's reply has {len(candidates or ())} of {top_k} candidates for token {i}", "protocol"
                )
            topk.token_ids[i] = [token_id for token_id, _ in candidates[:top_k]]
            topk.logprobs[i] = [value for _, value in candidates[:top_k]]
    return TeacherScore(logprobs=logprobs, topk=topk)
