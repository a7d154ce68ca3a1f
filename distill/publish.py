"""Weights from the trainer to the student's server, and the proof that they arrived.

After every publication a fixed token sequence, the canary, is scored by the server and by the trainer. If the two
disagree, the server samples from something that is not the student, and the run stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent_loop.scoring import ScoringError, prompt_logprobs
from agent_loop.transport import Transport
from distill.serving.embedded import EmbeddedEngine
from distill.student import Student


class PublishError(Exception):
    """The student's server does not serve the weights that were sent to it."""


class Publisher(Protocol):
    async def publish(self, student: Student, version: int) -> None:
        """Make the server sample from the student's present weights, as `version`. Returns when every later
        request is answered by them."""
        ...


class EmbeddedPublisher:
    """Hands the weights to an engine in this process."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine

    async def publish(self, student: Student, version: int) -> None:
        await self._engine.load_weights(student.state_dict_for_serving(), version)


async def verify_canary(
    transport: Transport, model: str, student: Student, canary: Sequence[int], *, tolerance: float
) -> float:
    """Score the canary by server and trainer.

    Args:
        canary: token ids, at least two.
        tolerance: largest difference of a log-probability that is still agreement, in nats. float32 against float32
            is below 1e-4; bfloat16 kernels differ by up to 0.5 on single tokens (docs/serving.md).

    Returns:
        The largest absolute difference, in nats.

    Raises:
        PublishError: if it is above `tolerance`, or the server gives no score.
    """
    try:
        served = (await prompt_logprobs(transport, model, list(canary), top_k=0, timeout_s=120.0)).logprobs
    except ScoringError as error:
        raise PublishError(f"the student's server did not score the canary after an update: {error}") from error
    trained = student.logprobs(canary)
    worst = max(abs(a - b) for a, b in zip(served[1:], trained[1:], strict=True) if a is not None and b is not None)
    if not worst <= tolerance:
        raise PublishError(
            f"after an update the student's server and the trainer disagree by {worst:.3g} nats on a fixed sequence "
            f"(allowed: {tolerance:g}). The server still has other weights; nothing more is sampled from it."
        )
    return worst
