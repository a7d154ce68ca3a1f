"""The one thread that runs the embedded engine's model: continuous batching, prefix reuse, scoring.

Every round of its loop starts the requests that fit, advances all running ones by a token and scores one batch of
prompts. Nothing else touches the model or the cache.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.serving.prefix import SlotTable
from distill.serving.sampling import candidates, draw, processed_logprobs, score_prompt
from distill.serving.slots import CausalLM
from distill.serving.wire import CompletionRequest, CompletionResult, WireError

log = logging.getLogger(__name__)

SHARE_BLOCK = 64
"""A prompt that shares this many further tokens with one about to be prefilled waits for it, and copies."""
PREFILL_TOKENS = 4096
"""Of one forward, padding included."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the worker."""

    request: CompletionRequest
    done: Callable[[Sequence[Job]], None]
    """Called once in the worker's thread, with all jobs of a round that share it."""
    owner: Any = None
    """Whatever `done` needs."""
    result: CompletionResult = field(default_factory=CompletionResult)
    error: WireError | None = None
    cancelled: bool = False
    """Set by the client's side; the worker drops the job at the next round."""
    prompt: np.ndarray = field(init=False)
    """[N] int32"""
    rng: random.Random = field(init=False)
    slot: int = -1
    num_computed: int = 0
    """Tokens whose keys and values are in the slot."""

    def __post_init__(self) -> None:
        self.prompt = np.asarray(self.request.prompt_ids, dtype=np.int32)
        self.rng = random.Random(self.request.seed)

    @property
    def reserved(self) -> int:
        """Cache positions that it may come to need."""
        return len(self.prompt) + self.request.max_tokens


class Worker:
    """Runs `Job`s on a model; see the module.

    Args:
        max_batch: sequences that run at once.
        max_kv_tokens: slots times tokens of the cache.
    """

    def __init__(self, lm: CausalLM, *, max_batch: int, max_kv_tokens: int, eos_token_id: int | None) -> None:
        self.lm = lm
        self.weight_version = 0
        self._max_batch = max_batch
        self._slots = SlotTable(lm.cache, max_slots=max_batch, max_tokens=max_kv_tokens)
        self._eos_token_id = eos_token_id
        self._wake = threading.Condition()
        self._incoming: deque[Job] = deque()
        self._exclusive: deque[tuple[Callable[[], None], Callable[[BaseException | None], None]]] = deque()
        self._stopping = False
        self._unfinished: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._to_score: list[Job] = []
        self._running: list[Job] = []
        self._finished: list[Job] = []
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)

    # Called from other threads.

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """
        Raises:
            WireError: 503 after `stop`.
        """
        with self._wake:
            if self._stopping:
                raise WireError("the engine is shut down", 503, "ServiceUnavailableError")
            self._incoming.extend(jobs)
            self._wake.notify()

    def run_exclusive(self, action: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        """Run `action` in the worker's thread when no sequence is running; those that wait, wait for it. `done`
        gets what it raised."""
        with self._wake:
            if self._stopping:
                raise WireError("the engine is shut down", 503, "ServiceUnavailableError")
            self._exclusive.append((action, done))
            self._wake.notify()

    def stop(self) -> None:
        """End the thread after its present round; what is unfinished fails with 503."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # The thread.

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._stopping
                    or self._incoming
                    or self._exclusive
                    or self._waiting
                    or self._running
                    or self._to_score
                ):
                    self._wake.wait()
                incoming = list(self._incoming)
                self._incoming.clear()
            self._unfinished.update(incoming)
            for job in incoming:
                (self._waiting if job.request.prompt_logprobs is None else self._to_score).append(job)
            if self._stopping:
                self._fail_all(WireError("the engine is shut down", 503, "ServiceUnavailableError"))
                return
            try:
                self._drop_cancelled()
                self._do_round()
            except Exception as error:
                log.exception("the embedded engine failed; its requests get status 500")
                self._fail_all(
                    WireError(f"the engine failed: {type(error).__name__}: {error}", 500, "InternalServerError")
                )
                self.forget()
            self._deliver()

    def _do_round(self) -> None:
        if self._exclusive and not self._running:
            action, done = self._exclusive.popleft()
            try:
                action()
            except Exception as error:
                done(error)
            else:
                done(None)
        elif not self._exclusive:
            self._admit()
        if self._running:
            self._decode()
        if self._to_score and not self._exclusive:
            self._score()

    def forget(self) -> None:
        """Drop all cached prefixes; only with nothing running."""
        self._slots.clear()

    def _fail_all(self, error: WireError) -> None:
        for job in self._unfinished.difference(self._finished):
            job.error = error
            job.slot = -1
            self._finished.append(job)
        self._running.clear()
        self._waiting.clear()
        self._to_score.clear()
        if error.status == 503:
            while self._exclusive:
                self._exclusive.popleft()[1](error)
            self._deliver()

    def _deliver(self) -> None:
        by_receiver: dict[Callable[[Sequence[Job]], None], list[Job]] = {}
        self._unfinished.difference_update(self._finished)
        for job in self._finished:
            by_receiver.setdefault(job.done, []).append(job)
        self._finished.clear()
        for done, jobs in by_receiver.items():
            done(jobs)

    def _drop_cancelled(self) -> None:
        cancelled = {job for job in self._unfinished if job.cancelled}
        if cancelled:
            for job in cancelled:
                self._release(job)
            self._unfinished -= cancelled
            self._running = [job for job in self._running if job not in cancelled]
            self._waiting = deque(job for job in self._waiting if job not in cancelled)
            self._to_score = [job for job in self._to_score if job not in cancelled]

    # Generation.

    def _admit(self) -> None:
        """Give waiting requests a slot, in order, and prefill them."""
        started: list[Job] = []
        beginnings: set[bytes] = set()
        postponed: list[Job] = []
        while self._waiting and len(self._running) + len(started) < self._max_batch:
            job = self._waiting.popleft()
            current = [*self._running, *started]
            longest = max((j.reserved for j in current), default=0)
            busy = self._slots.make_room(job.reserved, [j.slot for j in current], longest)
            if busy is None:
                self._waiting.appendleft(job)
                break
            for other, slot in zip(current, busy, strict=True):
                other.slot = slot
            source, shared = self._slots.longest_prefix(job.prompt)
            if len(job.prompt) > shared + SHARE_BLOCK:
                beginning = job.prompt[: shared + SHARE_BLOCK].tobytes()
                if beginning in beginnings:
                    postponed.append(job)
                    continue
                beginnings.add(beginning)
            job.slot = self._slots.place(job.prompt, source, shared, busy)
            job.num_computed = job.result.num_cached_tokens = shared
            job.result.weight_version = self.weight_version
            started.append(job)
        self._waiting.extendleft(reversed(postponed))
        # Similar lengths together: columns of a batch are as many as its longest row has tokens to feed.
        started.sort(key=lambda j: len(j.prompt) - j.num_computed)
        while started:
            width = len(started[-1].prompt) - started[-1].num_computed
            count = max(1, PREFILL_TOKENS // width)
            self._prefill(started[-count:])
            del started[-count:]

    def _prefill(self, jobs: list[Job]) -> None:
        """Feed what is new of the prompts, padded on the left so that the last column is every row's last token."""
        width = max(len(j.prompt) - j.num_computed for j in jobs)
        ids = np.zeros((len(jobs), width), dtype=np.int64)
        positions = np.full((len(jobs), width), -1, dtype=np.int64)
        for row, job in enumerate(jobs):
            count = len(job.prompt) - job.num_computed
            ids[row, width - count :] = job.prompt[job.num_computed :]
            positions[row, width - count :] = np.arange(job.num_computed, len(job.prompt))
        rows = self._tensor([j.slot for j in jobs])
        ids_t, positions_t = self._tensor(ids), self._tensor(positions)
        for start in range(0, width, PREFILL_TOKENS // 4):
            part = slice(start, start + PREFILL_TOKENS // 4)
            logits = self.lm.step(rows, ids_t[:, part], positions_t[:, part], positions_t[:, part] >= 0)
        for job in jobs:
            job.num_computed = len(job.prompt)
            self._slots.hold(job.slot, job.prompt, job.num_computed)
        self._running.extend(jobs)
        self._sample(jobs, logits)

    def _decode(self) -> None:
        """One more token for every running sequence."""
        jobs = sorted(self._running, key=lambda j: j.slot)
        high = jobs[-1].slot + 1
        # Reading the buffer in place is cheaper than gathering rows, unless most of what is read is idle.
        leading = high <= 2 * len(jobs)
        slots = [j.slot for j in jobs]
        at = slots if leading else range(len(jobs))
        ids = np.zeros(high if leading else len(jobs), dtype=np.int64)
        positions = np.full(len(ids), -1, dtype=np.int64)
        ids[at] = [j.result.token_ids[-1] for j in jobs]
        positions[at] = [j.num_computed for j in jobs]
        rows = torch.arange(high, device=self.lm.device) if leading else self._tensor(slots)
        positions_t = self._tensor(positions)[:, None]
        logits = self.lm.step(rows, self._tensor(ids)[:, None], positions_t, positions_t >= 0, leading=leading)
        if leading and high != len(jobs):
            logits = logits[self._tensor(slots)]
        for job in jobs:
            job.num_computed += 1
        self._sample(jobs, logits)

    def _sample(self, jobs: list[Job], logits: Tensor) -> None:
        """Draw a token for every job from its row; retire those that are through."""
        params = [j.request for j in jobs]
        logprobs = processed_logprobs(logits, params)
        drawn = draw(logprobs, params, [j.rng.getrandbits(32) / 2**32 for j in jobs])
        of_drawn = logprobs.gather(1, drawn[:, None])[:, 0].tolist()
        ended = 0
        for row, (job, token_id, logprob) in enumerate(zip(jobs, drawn.tolist(), of_drawn, strict=True)):
            request, result = job.request, job.result
            if not logprob > float("-inf"):
                job.error = not_finite()
                ended += self._end(job)
                continue
            result.token_ids.append(token_id)
            result.logprobs.append(logprob)
            if request.logprobs:
                result.candidates.append(candidates(logprobs[row], token_id, logprob, request.logprobs))
            if token_id in request.stop_token_ids:
                result.finish_reason = "stop"
                result.stop_reason = None if token_id == self._eos_token_id else token_id
                ended += self._end(job)
            elif len(result.token_ids) >= request.max_tokens:
                ended += self._end(job)
        if ended:
            self._running = [j for j in self._running if j.slot >= 0]

    def _end(self, job: Job) -> int:
        self._release(job)
        self._finished.append(job)
        return 1

    def _release(self, job: Job) -> None:
        """Leave the slot to the next request, with what it holds."""
        if job.slot < 0:
            return
        if job.error is None:
            ids = [*job.request.prompt_ids, *job.result.token_ids]
            self._slots.hold(job.slot, ids, job.num_computed)
        else:
            self._slots.wipe(job.slot)
        job.slot = -1

    # Scoring.

    def _score(self) -> None:
        """Score the oldest prompt and those nearest to it in length; sample the one token that vLLM samples."""
        oldest = len(self._to_score[0].prompt)
        order = sorted(self._to_score, key=lambda j: abs(len(j.prompt) - oldest))
        batch: list[Job] = []
        width = 0
        for job in order:
            width = max(width, len(job.prompt))
            if batch and width * (len(batch) + 1) > 2 * PREFILL_TOKENS:
                break
            batch.append(job)
        self._to_score = [j for j in self._to_score if j not in set(batch)]
        ids = np.zeros((len(batch), max(len(j.prompt) for j in batch)), dtype=np.int64)
        for row, job in enumerate(batch):
            ids[row, : len(job.prompt)] = job.prompt
        hidden = self.lm.hidden(self._tensor(ids))
        logits = self.lm.head(torch.stack([hidden[i, len(j.prompt) - 1] for i, j in enumerate(batch)]))
        for row, job in enumerate(batch):
            job.result.weight_version = self.weight_version
            count = job.request.prompt_logprobs or 0
            job.result.prompt_logprobs = score_prompt(self.lm, self._tensor(job.prompt), hidden[row], count)
            if job.result.prompt_logprobs is None:
                job.error = not_finite()
        one = [(i, j) for i, j in enumerate(batch) if j.error is None and j.request.max_tokens == 1]
        if one:
            self._sample([j for _, j in one], logits[self._tensor([i for i, _ in one])])
        for job in batch:
            if job.error is not None:
                self._finished.append(job)
            elif job.request.max_tokens > 1:
                self._waiting.append(job)

    def _tensor(self, values: np.ndarray | Sequence[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.lm.device)


def not_finite() -> WireError:
    return WireError(
        "the model's logits are not finite (NaN or infinite): its weights are broken, or the dtype overflows",
        500,
        "InternalServerError",
    )
