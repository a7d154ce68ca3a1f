"""The reverse KL on the student's own tokens, as pure functions of the trained rows. `docs/loss.md` derives them.

With s = log p_student(y) (with gradient), b = the same at sampling, t = log p_teacher(y), A = the advantage of the
rewards and r = min(exp(s - b), rho) (without gradient), the loss of a row is

    sampled   -r (teacher_tau (t - s).detach() + adv_tau A) s
    topk      teacher_tau (exact over the teacher's K ids + REINFORCE on the tail)  - r adv_tau A s
    full      teacher_tau sum_v p_student(v) (log p_student(v) - log p_teacher(v))  - r adv_tau A s

and the loss is the sum over rows divided by the trained tokens of the whole step. On policy, the expected gradient of
all three is the gradient of KL(student || teacher) at the visited positions, exactly; they differ in variance.
`advantage_clip` bounds t - s in the first two, and `turn_balance` gives the rows weights other than 1.
"""

from __future__ import annotations

import torch

from distill.config import LossConfig
from distill.types import Batch, LossOutput

MAX_HEAD_MASS = 1 - 1e-6
"""Bounds the logarithms of the tail's mass. It enters the baseline alone, which no expectation depends on."""


def reverse_kl_loss(
    logits_NV: torch.Tensor,
    batch: Batch,
    config: LossConfig,
    num_trained_step: int,
    teacher_logprobs_NV: torch.Tensor | None = None,
) -> LossOutput:
    """The loss of some trained rows.

    Args:
        logits_NV: the student's, before softmax; row n predicts `batch.targets_N[n]`. float64 stays float64, anything
            narrower than float32 is widened to it.
        batch: of the rows only the `*_N` and `*_NK` tensors are read; they follow the device of `logits_NV`.
        num_trained_step: trained tokens of the whole step, over all micro-batches and ranks: the denominator.
        teacher_logprobs_NV: log-softmax of a teacher in this process, for `full`.

    Returns:
        The loss, and per row, without gradient: `teacher_kl` (s - t), `k2`, `k3`, `entropy`, `ratio` (r),
        `clipped` (1 where the cap acted), `mismatch` (s - b). In nats.

    Raises:
        ValueError: what the loss type needs is not there, or the denominator is smaller than the rows.
    """
    if num_trained_step < max(1, len(logits_NV)):
        raise ValueError(f"num_trained_step is {num_trained_step}, but the micro-batch alone has {len(logits_NV)} rows")
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    dtype, device = logits_NV.dtype, logits_NV.device
    t_N = batch.teacher_logprobs_N.to(device, dtype)
    b_N = batch.sampling_logprobs_N.to(device, dtype)
    targets_N = batch.targets_N.to(device)

    # On a CPU, twice as fast as `logsumexp` and the gathered logits; the logits themselves are not needed again.
    logprobs_NV = logits_NV.log_softmax(-1)
    del logits_NV
    s_N = logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    with torch.no_grad():
        raw_ratio_N = (s_N - b_N).exp()
        r_N = raw_ratio_N.clamp(max=config.rho)
    clip = float("inf") if config.advantage_clip is None else config.advantage_clip
    if config.type == "sampled":
        teacher_N = -r_N * (t_N - s_N).detach().clamp(-clip, clip) * s_N
    elif config.type == "topk":
        teacher_N = _topk_rows(logprobs_NV, s_N, t_N, r_N, targets_N, batch, clip)
    else:
        teacher_N = _full_rows(logprobs_NV, teacher_logprobs_NV)
    rows_N = config.teacher_tau * teacher_N
    if config.adv_tau:
        rows_N = rows_N - r_N * config.adv_tau * batch.advantages_N.to(device, dtype) * s_N
    metrics_N = _row_metrics(logprobs_NV, s_N, t_N, b_N, raw_ratio_N, config.rho)
    if config.advantage_clip is not None:
        metrics_N["advantage_clipped"] = ((s_N - t_N).detach().abs() > clip).to(dtype)
    return LossOutput(loss=(batch.weights_N.to(device, dtype) * rows_N).sum() / num_trained_step, metrics_N=metrics_N)


def _topk_rows(
    logprobs_NV: torch.Tensor,
    s_N: torch.Tensor,
    t_N: torch.Tensor,
    r_N: torch.Tensor,
    targets_N: torch.Tensor,
    batch: Batch,
    clip: float,
) -> torch.Tensor:
    """With d_v = log p_student(v) - log p_teacher(v) and any baseline c that does not depend on the sampled token,

        grad KL = sum_{v in K} (d_v - c) grad p_student(v)  +  E_y 1[y not in K] (d_y - c) grad log p_student(y)

    since the probabilities sum to one. The head is exact and needs no importance ratio; c is the KL between student and
    teacher with the tail lumped into one token, which is close to the mean of d. K = 0 is `sampled`, K = V is `full`.
    """
    if batch.topk_ids_NK is None or batch.topk_logprobs_NK is None:
        raise ValueError('loss.type "topk" needs the teacher\'s candidates; set teacher.top_k')
    ids_NK = batch.topk_ids_NK.to(logprobs_NV.device)
    teacher_NK = batch.topk_logprobs_NK.to(logprobs_NV)
    student_NK = logprobs_NV.gather(-1, ids_NK)
    p_NK = student_NK.exp()
    d_NK = (student_NK - teacher_NK).detach().clamp(-clip, clip)
    with torch.no_grad():
        tail_N = 1 - p_NK.sum(-1).clamp(max=MAX_HEAD_MASS)
        teacher_tail_N = 1 - teacher_NK.exp().sum(-1).clamp(max=MAX_HEAD_MASS)
        c_N = (p_NK * d_NK).sum(-1) + tail_N * (tail_N.log() - teacher_tail_N.log())
        in_tail_N = ~(ids_NK == targets_N[:, None]).any(-1)
    head_N = (p_NK * (d_NK - c_N[:, None])).sum(-1)
    sampled_N = r_N * ((s_N - t_N).detach().clamp(-clip, clip) - c_N) * s_N
    return head_N + torch.where(in_tail_N, sampled_N, torch.zeros_like(sampled_N))


def _full_rows(logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor | None) -> torch.Tensor:
    """The KL itself; its gradient is what autograd makes of it."""
    if teacher_logprobs_NV is None:
        raise ValueError('loss.type "full" needs a teacher in this process: Student.set_teacher')
    if teacher_logprobs_NV.shape != logprobs_NV.shape:
        raise ValueError(
            f"loss.type \"full\": the teacher's rows have shape {list(teacher_logprobs_NV.shape)}, the student's "
            f"{list(logprobs_NV.shape)}; both need one vocabulary"
        )
    return (logprobs_NV.exp() * (logprobs_NV - teacher_logprobs_NV.to(logprobs_NV))).sum(-1)


@torch.no_grad()
def _row_metrics(
    logprobs_NV: torch.Tensor,
    s_N: torch.Tensor,
    t_N: torch.Tensor,
    b_N: torch.Tensor,
    raw_ratio_N: torch.Tensor,
    rho: float,
) -> dict[str, torch.Tensor]:
    """Sample estimators k1, k2, k3 of KL(student || teacher): http://joschu.net/blog/kl-approx.html. k3 is a metric
    and never the loss: on policy, the gradient of its mean is that of the forward KL."""
    kl_N = s_N - t_N
    return {
        "teacher_kl": kl_N,
        "k2": kl_N.square() / 2,
        "k3": torch.expm1(-kl_N) + kl_N,
        "entropy": -(logprobs_NV.exp() * logprobs_NV).sum(-1),
        "ratio": raw_ratio_N.clamp(max=rho),
        "clipped": (raw_ratio_N > rho).to(logprobs_NV.dtype),
        "mismatch": s_N - b_N,
    }
