"""Log-probabilities of given tokens: what a score is, and the reply that every server of vLLM's format can give.

Entry i of `prompt_logprobs` belongs to token i; the number is looked up by the token's id, never by order: vLLM puts K
or K + 1 entries there. A number that is missing, not finite, or vLLM's stand-in for "impossible" (-9999.0) is an error.
`agent_loop/scorers.py` has the ways to ask, of which one is chosen at the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent_loop.transport import Transport, TransportError

IMPOSSIBLE = -9998.0
"""vLLM clamps log-probabilities at -9999.0; nothing near it is a real one (NeMo-RL issue 2962)."""
ROUNDING = 1e-4
"""A log-probability may be this much above zero; more is an error."""

ScoringErrorKind = Literal["unavailable", "protocol", "rejected", "context_overflow", "not_finite"]


class ScoringError(Exception):
    """No usable scores."""

    def __init__(self, message: str, kind: ScoringErrorKind) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of a sequence of L tokens."""

    logprobs: list[float | None]
    """[L] log p(token i | tokens before it); None for the first, and where not asked for."""
    topk: list[list[tuple[int, float]] | None] | None
    """[L][K] (id, log-probability): the likeliest, best first, or the ids that were given, in their order. None where
    K = 0 was asked for; entries are None where `logprobs` are."""


async def prompt_logprobs(
    transport: Transport,
    model: str,
    token_ids: Sequence[int],
    *,
    top_k: int,
    timeout_s: float,
    key: str = "",
    positions: Iterable[int] | None = None,
) -> PromptScores:
    """Score a sequence with `/v1/completions`, which every server of vLLM's format has.

    Args:
        top_k: candidates a position beside the token itself; 0 is the token alone.
        key: requests of one key go to one server.
        positions: of the tokens whose numbers are needed; None: all but the first.

    Raises:
        ScoringError: the server is gone, refuses, or gives numbers that cannot be used.
    """
    payload = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": 1,  # vLLM refuses 0
        "temperature": 1.0,
        "prompt_logprobs": top_k,
        "return_tokens_as_token_ids": True,
    }
    try:
        reply = await transport.post_json("/v1/completions", payload, timeout_s=timeout_s, key=key)
    except TransportError as error:
        raise ScoringError(str(error), error.kind) from error
    try:
        rows = reply["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        raise ScoringError("the reply has no choices[0].prompt_logprobs", "protocol") from None
    return await asyncio.to_thread(read_scores, rows, token_ids, top_k, positions)


def read_scores(
    rows: Any, token_ids: Sequence[int], top_k: int, positions: Iterable[int] | None = None
) -> PromptScores:
    """Check a reply's entries and look each token up by its id.

    Args:
        rows: `prompt_logprobs` of the reply.
        positions: of the tokens whose numbers are needed; None: all but the first.

    Raises:
        ScoringError: wrong length, a missing id, a number that cannot be used.
    """
    if rows is None:
        raise ScoringError("the server ignored prompt_logprobs: it cannot score given tokens", "protocol")
    if not isinstance(rows, list) or len(rows) != len(token_ids):
        size = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise ScoringError(f"{size} scores came back for {len(token_ids)} tokens", "protocol")
    logprobs: list[float | None] = [None] * len(token_ids)
    topk: list[list[tuple[int, float]] | None] | None = [None] * len(token_ids) if top_k else None
    for position in range(1, len(token_ids)) if positions is None else positions:
        row, key = rows[position], str(token_ids[position])
        if not isinstance(row, Mapping) or key not in row:
            raise ScoringError(f"the reply has no score for token {position} (id {key})", "protocol")
        logprobs[position] = _number(row[key], position, key)
        if topk is not None:
            try:
                found = [(int(token), _number(entry, position, token)) for token, entry in row.items()]
            except ValueError:
                raise ScoringError(
                    f"the candidates of token {position} are not named by their ids: {list(row)[:3]}", "protocol"
                ) from None
            found.sort(key=lambda pair: -pair[1])
            topk[position] = found[:top_k]
    return PromptScores(logprobs, topk)


def _number(entry: Any, position: int, key: str) -> float:
    value = entry.get("logprob") if isinstance(entry, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ScoringError(f"the score of token {position} (id {key}) is {value!r}, not a number", "protocol")
    return checked(value, position, key)


def checked(value: float, position: int, key: str | int) -> float:
    """A log-probability of token `position` under id `key`, at most 0.

    Raises:
        ScoringError: it is none.
    """
    if not IMPOSSIBLE < value <= ROUNDING:  # false for NaN too
        raise ScoringError(
            f"the score of token {position} (id {key}) is {value!r}: not a log-probability", "not_finite"
        )
    return min(float(value), 0.0)
