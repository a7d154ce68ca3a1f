"""The loss of trained rows without their logits: output head, loss and both gradients in one walk over slices of rows.

The loss of a row depends on that row alone, and what it is divided by is known before. So the gradient of a slice's
logits is known as soon as its logits are, and goes on to the features and to the head's weight at once: nothing is kept
for a backward pass and nothing is computed twice. With G_v the gradient of the loss with respect to log p_v, and p the
student's probabilities,

    dL/dlogit_v = G_v - p_v sum_u G_u

An entropy H with gradient h adds -h p_v (log p_v + H). `sampled` and `topk` have G at the target and the K candidates
only, `full` has in addition k p_v (d_v - KL) with k the
gradient with respect to the KL of the row and d_v = log p_v - log p_teacher(v). What k and G are is not said here:
autograd finds them on `loss.row_losses`.

Beside the gradients themselves, one buffer for the logits of a slice is made, and a quarter of it to work in (`full`:
and as much for the teacher). Narrow weights (bfloat16) need their products beside it: half of it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from distill.config import LossConfig
from distill.loss import StudentRows, at_temperature, candidate_ids, check_denominator, row_losses, teacher_rows
from distill.types import Batch, LossOutput

SLICE_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Of one slice's logits in float32. Each slice after the first reads and writes the gradient of the head once more,
which costs as much as multiplying about 20 rows (CPU) or 200 (a GPU's ratio of arithmetic to memory)."""
BLOCKS = 4
"""Of a slice: the way from logits to their gradient is gone block by block, so that only one is there twice."""
WEIGHT_CHUNK = 2**24
"""Numbers of the head's gradient that are made in narrow format at a time, before they are added up in float32."""

TeacherOf = Callable[[int, int], torch.Tensor]
"""[n, V] log-probabilities of the teacher for rows [start, end)."""


def slice_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of a slice: as few slices as the bound allows, of one size."""
    most = max(1, SLICE_BYTES.get(device.type, SLICE_BYTES["cuda"]) // (4 * vocab_size))
    slices = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // slices))


def head_loss(
    features_NH: torch.Tensor,
    head: nn.Linear,
    batch: Batch,
    config: LossConfig,
    num_trained_step: int,
    teacher: TeacherOf | None = None,
    temperature: float = 1.0,
) -> LossOutput:
    """`reverse_kl_loss(head(features), ...)`, value and gradient, for a head that is a matrix and nothing else.

    The gradients are made here, not in `backward`, which only hands them out, once: to the features, and to weight and
    bias where they are trained. Products are in the format of the weight, all else in float32 (float64 for float64).

    Args:
        features_NH: in the format of the head's weight.
        num_trained_step: trained tokens of the whole step, over all micro-batches and ranks: the denominator.
        teacher: for `full`.
        temperature: as `reverse_kl_loss`.

    Returns:
        As `reverse_kl_loss`; where gradients are off (`torch.no_grad`), the value alone.

    Raises:
        ValueError: as `reverse_kl_loss`.
    """
    check_denominator(num_trained_step, len(features_NH))
    if config.type == "full" and config.entropy_coeff:
        raise ValueError('head_loss: the entropy of "full" has no gradient here; take reverse_kl_loss')
    inputs = (features_NH, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and i is not None and i.requires_grad for i in inputs]
    with torch.no_grad():
        walk = _Walk(features_NH, head, wanted, config, num_trained_step, temperature)
        rows = batch.rows(0, len(features_NH), features_NH.device)
        for start in range(0, max(1, len(features_NH)), walk.size):
            walk.take(start, rows.rows(start, start + walk.size), teacher)
    loss: torch.Tensor = _HandOut.apply(walk.loss, walk.gradients(), *inputs)
    return LossOutput(loss=loss, metrics_N={n: torch.cat([m[n] for m in walk.metrics]) for n in walk.metrics[0]})


class _HandOut(torch.autograd.Function):
    """Ties gradients that are there already to what they are the gradients of."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: tuple[torch.Tensor | None, ...], *inputs: Any) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("head_loss: its gradients were handed out by an earlier backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        if float(gradient) != 1:  # one pass over the head's gradient less
            for g in gradients:
                if g is not None:
                    g.mul_(gradient)
        return (None, None, *gradients)


class _Walk:
    """What the slices add up to. Runs without autograd, but for the formulas of the rows."""

    def __init__(
        self,
        features_NH: torch.Tensor,
        head: nn.Linear,
        wanted: list[bool],
        config: LossConfig,
        denominator: int,
        temperature: float,
    ) -> None:
        self._features_NH, self._weight_VH, self._bias_V = features_NH, head.weight, head.bias
        self._config, self._denominator, self._temperature = config, denominator, temperature
        count, vocab_size, device = len(features_NH), len(head.weight), features_NH.device
        self.size = slice_rows(count, vocab_size, device)
        wide = torch.float64 if features_NH.dtype == torch.float64 else torch.float32
        self._is_wide = features_NH.dtype == wide
        self._slice_NV = torch.empty(self.size, vocab_size, dtype=wide, device=device)
        self._block_NV = torch.empty(-(-self.size // BLOCKS), vocab_size, dtype=wide, device=device)
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.metrics: list[dict[str, torch.Tensor]] = []
        self._wants_any = any(wanted)
        self._dfeatures_NH = torch.empty_like(features_NH) if wanted[0] else None
        # Sums over slices are float32; where there is one slice there is nothing to sum.
        sums = features_NH.dtype if count <= self.size else wide
        self._dweight_VH = torch.empty_like(head.weight, dtype=sums) if wanted[1] else None
        self._dbias_V = torch.zeros_like(head.bias, dtype=wide) if wanted[2] else None

    def take(self, start: int, batch: Batch, teacher: TeacherOf | None) -> None:
        """The rows of `batch`, which are those from `start` on."""
        features_NH = self._features_NH[start : start + batch.num_trained]
        logits_NV = self._logits(features_NH, self._slice_NV[: len(features_NH)])
        size = len(self._block_NV)
        for first in range(0, max(1, len(features_NH)), size):
            rows = batch.rows(first, first + size)
            teacher_NV = teacher(start + first, start + first + rows.num_trained) if teacher else None
            self._to_gradient(logits_NV[first : first + size], rows, teacher_NV)
        if self._wants_any:
            self._pass_on(start, features_NH, logits_NV)

    def _to_gradient(self, logits_NV: torch.Tensor, batch: Batch, teacher_NV: torch.Tensor | None) -> None:
        """Add these rows' loss; logits become its gradient with respect to them, if anything wants one."""
        logprobs_NV = torch.log_softmax(logits_NV, -1, out=self._block_NV[: len(logits_NV)])
        ids_NK = candidate_ids(batch, self._config)
        s_N = logprobs_NV.gather(-1, batch.targets_N[:, None]).squeeze(-1)
        candidates_NK = None if ids_NK is None else logprobs_NV.gather(-1, ids_NK)
        tempered_N = at_temperature(logprobs_NV, batch.targets_N, self._temperature)
        p_NV = torch.exp(logprobs_NV, out=logits_NV)
        kl_N = None
        if self._config.type == "full":
            entropy_N = -torch.linalg.vecdot(p_NV, logprobs_NV)
            d_NV = logprobs_NV.sub_(teacher_rows(teacher_NV, logprobs_NV))
            kl_N = torch.linalg.vecdot(p_NV, d_NV)
        else:
            entropy_N = -logprobs_NV.mul_(p_NV).sum(-1)  # in place; `vecdot` makes a third block

        entropies = [entropy_N] if self._config.entropy_coeff else []
        leaves = [leaf.requires_grad_() for leaf in (s_N, candidates_NK, kl_N, *entropies) if leaf is not None]
        student = StudentRows(
            s_N=s_N, candidates_NK=candidates_NK, kl_N=kl_N, entropy_N=entropy_N, tempered_N=tempered_N
        )
        with torch.enable_grad():
            rows_N, metrics_N = row_losses(student, batch, self._config)
            loss = rows_N.sum() / self._denominator
        self.loss += loss.detach()
        self.metrics.append(metrics_N)
        if not self._wants_any:
            return
        by_s_N, *by_others = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        by_entropy_N = by_others.pop() if entropies else None
        if kl_N is None:
            by_p_N = -(by_s_N + sum(g_NK.sum(-1) for g_NK in by_others))
            if by_entropy_N is None:
                torch.mul(p_NV, by_p_N[:, None], out=logits_NV)
            else:  # dH/dz_v = -p_v (log p_v + H); the block holds p log p
                torch.mul(p_NV, (by_p_N - by_entropy_N * entropy_N.detach())[:, None], out=logits_NV)
                logits_NV.sub_(logprobs_NV.mul_(by_entropy_N[:, None]))
        else:
            d_NV.sub_(kl_N.detach()[:, None]).mul_(by_others[0][:, None]).sub_(by_s_N[:, None])
            torch.mul(p_NV, d_NV, out=logits_NV)
        # One id may be the target and a candidate: two calls, so that no sum depends on the order of threads.
        logits_NV.scatter_add_(-1, batch.targets_N[:, None], by_s_N[:, None])
        if ids_NK is not None:
            logits_NV.scatter_add_(-1, ids_NK, by_others[0])

    def _logits(self, features_NH: torch.Tensor, out_NV: torch.Tensor) -> torch.Tensor:
        if not self._is_wide:
            return out_NV.copy_(nn.functional.linear(features_NH, self._weight_VH, self._bias_V))
        if self._bias_V is None:
            return torch.mm(features_NH, self._weight_VH.T, out=out_NV)
        return torch.addmm(self._bias_V, features_NH, self._weight_VH.T, out=out_NV)

    def _pass_on(self, start: int, features_NH: torch.Tensor, gradient_NV: torch.Tensor) -> None:
        """From the logits to what they are made of."""
        if self._dbias_V is not None:
            self._dbias_V += gradient_NV.sum(0)
        gradient_NV = gradient_NV.to(features_NH.dtype)
        if self._dfeatures_NH is not None:
            torch.mm(gradient_NV, self._weight_VH, out=self._dfeatures_NH[start : start + len(features_NH)])
        if self._dweight_VH is None:
            return
        if start == 0 and self._dweight_VH.dtype == features_NH.dtype:
            torch.mm(gradient_NV.T, features_NH, out=self._dweight_VH)
        elif self._is_wide:
            self._dweight_VH.addmm_(gradient_NV.T, features_NH)
        else:
            step = max(1, WEIGHT_CHUNK // features_NH.shape[1])
            for sums_CH, gradient_NC in zip(self._dweight_VH.split(step), gradient_NV.split(step, 1), strict=True):
                if start == 0:
                    sums_CH.zero_()
                sums_CH += gradient_NC.T @ features_NH

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of features, weight and bias, in their format; None where not wanted."""
        dtype = self._features_NH.dtype
        dweight_VH = None if self._dweight_VH is None else _narrowed(self._dweight_VH, dtype)
        return self._dfeatures_NH, dweight_VH, None if self._dbias_V is None else self._dbias_V.to(dtype)


def _narrowed(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in a format of half the size, in the same memory: two of them would be the largest tensors of
    the step."""
    if wide.dtype == dtype:
        return wide
    numbers = wide.view(-1)
    narrow = numbers.view(dtype)[: len(numbers)]
    for start in range(0, len(numbers), WEIGHT_CHUNK):  # writes behind what is read
        narrow[start : start + WEIGHT_CHUNK] = numbers[start : start + WEIGHT_CHUNK].to(dtype)
    return narrow.view(wide.shape)
