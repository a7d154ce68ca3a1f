"""Drawing tokens from logits, each row with parameters and random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5


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
