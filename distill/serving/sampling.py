"""Tokens drawn from logits, each row with parameters and random numbers of its own; and given tokens scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distill.serving.slots import CausalLM
from distill.serving.wire import PromptScores, TokenLogprobs

GREEDY_BELOW = 1e-5
HEAD_BYTES = 64 << 20
"""Of the logits of one chunk in scoring."""


class RowParams(Protocol):
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


def processed_logprobs(logits: Tensor, rows: Sequence[RowParams]) -> Tensor:
    """Log-probabilities that the tokens are drawn with: after temperature, then top-k, then top-p, as in vLLM's
    `processed_logprobs`. A greedy row has those of the model itself.

    Args:
        logits: [B, V] float32.

    Returns:
        [B, V] float32; -inf where a token cannot be drawn.
    """
    if any(r.temperature != 1.0 for r in rows):
        temperatures = [r.temperature if r.temperature >= GREEDY_BELOW else 1.0 for r in rows]
        logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    random = [i for i, r in enumerate(rows) if r.temperature >= GREEDY_BELOW]
    cut = [i for i in random if 0 < rows[i].top_k < logits.shape[1] or rows[i].top_p < 1.0]
    if cut:
        index = torch.tensor(cut, device=logits.device)
        logprobs = logprobs.index_copy(0, index, _cut(logprobs[index], [rows[i] for i in cut]))
    return logprobs


def _cut(logprobs: Tensor, rows: Sequence[RowParams]) -> Tensor:
    device, size = logprobs.device, logprobs.shape[1]
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([r.top_k if r.top_k > 0 else size for r in rows], device=device)[:, None]
    top_p = torch.tensor([r.top_p for r in rows], device=device, dtype=torch.float64)[:, None]
    ordered = ordered.masked_fill(torch.arange(size, device=device) >= top_k, float("-inf"))
    probs = ordered.double().softmax(-1)
    # A token stays while the mass before it is below top_p; the first always stays.
    before = probs.cumsum(-1) - probs
    keep = before < top_p
    keep[:, 0] = True
    ordered = ordered.masked_fill(~keep, float("-inf")).log_softmax(-1)
    return torch.full_like(logprobs, float("-inf")).scatter(1, order, ordered)


def draw(logprobs: Tensor, rows: Sequence[RowParams], uniforms: Sequence[float]) -> Tensor:
    """One token a row, by inversion of its cumulative distribution: one random number a token, so that a row's draw
    depends on its own seed alone.

    Args:
        logprobs: [B, V] as `processed_logprobs` gives them.
        uniforms: [B] in [0, 1 - 2**-32].

    Returns:
        [B] int64
    """
    if all(r.temperature < GREEDY_BELOW for r in rows):
        return logprobs.argmax(-1)
    # float64: a float32 sum over 150,000 tokens would lose the rare ones.
    mass = logprobs.exp().cumsum(-1, dtype=torch.float64)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device)[:, None] * mass[:, -1:]
    # right=True: the first token whose cumulative mass is above the target, never one of mass zero.
    ids = torch.searchsorted(mass, targets, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)
    if any(r.temperature < GREEDY_BELOW for r in rows):
        greedy = torch.tensor([r.temperature < GREEDY_BELOW for r in rows], device=logprobs.device)
        ids = torch.where(greedy, logprobs.argmax(-1), ids)
    return ids


def candidates(logprobs: Tensor, token_id: int, logprob: float, count: int) -> TokenLogprobs:
    """The sampled token and the `count` likeliest of those that could be drawn.

    Args:
        logprobs: [V]
    """
    values, ids = logprobs.topk(min(count, len(logprobs)))
    entry = TokenLogprobs(token_ids=[token_id], logprobs=[logprob])
    for i, value in zip(ids.tolist(), values.tolist(), strict=True):
        if i != token_id and value > float("-inf"):
            entry.token_ids.append(i)
            entry.logprobs.append(value)
    return entry


def score_prompt(lm: CausalLM, ids: Tensor, hidden: Tensor, count: int) -> PromptScores | None:
    """Log-probability and rank of a prompt's tokens, and the `count` likeliest at each position.

    Args:
        ids: [N]
        hidden: [>= N, H] last hidden states. The head runs in chunks: all logits of a long prompt would be larger
            than the model.

    Returns:
        None if a number is not finite.
    """
    scores = PromptScores(width=count + 1)
    targets = ids[1:, None]
    chunk = max(1, HEAD_BYTES // (4 * lm.vocab_size))
    for start in range(0, len(targets), chunk):
        end = min(start + chunk, len(targets))
        logprobs = lm.head(hidden[start:end]).log_softmax(-1)
        given = targets[start:end]
        values = logprobs.gather(1, given)
        if not bool(torch.isfinite(values).all()):
            return None
        ranks = (logprobs > values).sum(-1, keepdim=True) + 1
        if count:
            best = logprobs.topk(count, dim=-1)
            numbers = torch.arange(1, count + 1, device=given.device).expand_as(best.indices)
            given = torch.cat([given, best.indices], 1)
            values = torch.cat([values, best.values], 1)
            ranks = torch.cat([ranks, numbers], 1)
        scores.token_ids += given.flatten().tolist()
        scores.logprobs += values.flatten().tolist()
        scores.ranks += ranks.flatten().tolist()
    return scores
