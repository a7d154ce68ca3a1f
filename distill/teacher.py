"""Teacher scores: the log-probability that a served model gives to each token that the student sampled.

One request a finished trace, ids in and numbers out, looked up by id; the way to ask is probed once
(agent_loop/scorers.py). A score that cannot be had is a `TeacherError`, never a number: the episode is dropped from
the step and counted, and the run stops when too many are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from agent_loop.scorers import Scorer, choose_scorer
from agent_loop.scoring import PromptScores, ScoringError
from agent_loop.transport import Transport
from agent_loop.types import Episode, TokenTrace, TopK
from distill.teacher_context import TeacherContext
from distill.types import TeacherError, TeacherScore
from envs.types import Task


class TokenBudget:
    """A semaphore of tokens: at most `limit` are in flight at once. First come first served, group by group: who waits
    stands behind the last of its own group, so that sequences with one beginning are scored one after the other. A
    single request larger than the limit waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: list[_Waiting] = []

    @asynccontextmanager
    async def take(self, tokens: int, group: str = "") -> AsyncIterator[None]:
        tokens = min(tokens, self._limit)
        if self._waiting or self._used + tokens > self._limit:
            place = _Waiting(tokens, group, asyncio.get_running_loop().create_future())
            mine = [i for i, other in enumerate(self._waiting) if other.group == group]
            self._waiting.insert(mine[-1] + 1 if mine else len(self._waiting), place)
            try:
                await place.turn
            except asyncio.CancelledError:
                if place.turn.done() and not place.turn.cancelled():
                    self._release(tokens)
                else:
                    self._waiting.remove(place)
                raise
        else:
            self._used += tokens
        try:
            yield
        finally:
            self._release(tokens)

    def _release(self, tokens: int) -> None:
        self._used -= tokens
        while self._waiting and self._used + self._waiting[0].tokens <= self._limit:
            place = self._waiting.pop(0)
            if not place.turn.done():
                self._used += place.tokens
                place.turn.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    tokens: int
    group: str
    turn: asyncio.Future[None]


def no_context(_task: Task) -> TeacherContext | None:
    """The `context_of` of a teacher that sees what the student sees."""
    return None


class HttpTeacher:
    """A `TeacherScorer` over HTTP.

    Args:
        transport: to the teacher's server, or to an embedded engine in process.
        model: the name that the server knows it by.
        top_k: candidates a position, for the `topk` loss; 0 is the sampled token alone.
        candidates: whose they are: the teacher's likeliest, or the student's at sampling, which the trace brings along.
        max_tokens_in_flight: over all requests at once; long prompts cost the server memory.
        context_of: what it sees in front of a task and the student does not; None: nothing.
    """

    def __init__(
        self,
        transport: Transport,
        model: str,
        *,
        top_k: int = 0,
        candidates: Literal["teacher", "student"] = "teacher",
        max_tokens_in_flight: int = 131_072,
        timeout_s: float = 600.0,
        context_of: Callable[[Task], TeacherContext | None] = no_context,
    ) -> None:
        self._transport = transport
        self._model = model
        self._top_k = top_k
        self._given_ids = top_k > 0 and candidates == "student"
        self._asking: asyncio.Future[Scorer] | None = None
        self._budget = TokenBudget(max_tokens_in_flight)
        self._timeout_s = timeout_s
        self._context_of = context_of

    async def probe(self) -> str:
        """Find out how the server is best asked, once; the first score does it where nobody has. Returns its name.

        Raises:
            TeacherError: the server is not there, or cannot do what the configuration wants.
        """
        return (await self._ask_by()).name

    async def _ask_by(self) -> Scorer:
        asking = self._asking
        if asking is None:  # one probe for all who wait
            asking = self._asking = asyncio.ensure_future(
                choose_scorer(
                    self._transport,
                    self._model,
                    top_k=self._top_k,
                    given_ids=self._given_ids,
                    timeout_s=self._timeout_s,
                )
            )
        try:
            return await asyncio.shield(asking)
        except ScoringError as error:
            if self._asking is asking:
                self._asking = None  # a server that comes back is asked again
            raise TeacherError(str(error), error.kind) from error

    async def score(
        self, episode: Episode, *, on_sent: Callable[[int], None] = lambda _: None
    ) -> Sequence[TeacherScore]:
        """Score all traces of an episode at once; see `TeacherScorer`. What is sent is the teacher's cost: contexts
        included."""
        return await asyncio.gather(*(self._score_trace(episode, trace, on_sent) for trace in episode.traces))

    async def aclose(self) -> None:
        if self._asking is not None:
            self._asking.cancel()  # no harm where it is done
        await self._transport.aclose()

    async def _score_trace(self, episode: Episode, trace: TokenTrace, on_sent: Callable[[int], None]) -> TeacherScore:
        if not any(trace.loss_mask):
            return TeacherScore(logprobs=[None] * len(trace))
        scorer = await self._ask_by()
        privileged = self._context_of(episode.task)
        context, skipped = privileged.head(episode.task, trace) if privileged is not None else ([], 0)
        shift = len(context) - skipped
        # Nothing after the last trained token is needed.
        end = len(trace) - trace.loss_mask[::-1].index(True)
        ids = [*context, *trace.token_ids[skipped:end]]
        trained = [i for i, is_trained in enumerate(trace.loss_mask) if is_trained]
        candidates = _candidates(trace, trained, self._top_k) if self._given_ids else None
        async with self._budget.take(len(ids), episode.task.id):
            on_sent(len(ids))
            try:
                scores = await scorer.score(
                    self._transport,
                    self._model,
                    ids,
                    [i + shift for i in trained],
                    top_k=self._top_k,
                    timeout_s=self._timeout_s,
                    # A group shares its prompt: with a prefix cache, one server should see all of it.
                    key=episode.task.id if scorer.reads_prefix_cache else episode.id,
                    candidates=candidates,
                )
            except ScoringError as error:
                raise TeacherError(str(error), error.kind) from error
        return align(trace, scores, shift=shift, top_k=self._top_k)


def _candidates(trace: TokenTrace, trained: Sequence[int], top_k: int) -> list[list[int]]:
    """[R][K] the student's likeliest ids at sampling.

    Raises:
        TeacherError: the student's server did not say them.
    """
    topk = trace.sampling_topk
    found = [topk.token_ids[i] if topk is not None else None for i in trained]
    rows = [ids[:top_k] for ids in found if ids is not None and len(ids) >= top_k]
    if len(rows) < len(trained):
        raise TeacherError(
            f'loss.candidates = "student": {len(trained) - len(rows)} of {len(trained)} sampled tokens have no {top_k} '
            "candidates of the student's server",
            "protocol",
        )
    return rows


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
