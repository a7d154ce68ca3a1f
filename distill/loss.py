"""The reverse KL on the student's own tokens, as pure functions of the trained rows. `docs/loss.md` derives them.

With s = log p_student(y) (with gradient), b = the same at sampling, t = log p_teacher(y), A = the advantage of the
rewards and r = min(exp(s - b), rho) (without gradient), the loss of a row is

    sampled   -r (teacher_tau (t - s).detach() + adv_tau A) s
    topk      teacher_tau (exact over the teacher's K ids + REINFORCE on the tail)  - r adv_tau A s
    full      teacher_tau sum_v p_student(v) (log p_student(v) - log p_teacher(v))  - r adv_tau A s

and the loss is the sum over rows divided by the trained tokens of the whole step. On policy, the expected gradient of
all three is the gradient of KL(student || teacher) at the visited positions, exactly; they differ in variance.
Options of `sampled`: `kl_estimator = "k2"` has r (s - t)^2 / 2 for the teacher's term, which has the same gradient;
`surrogate = "ppo"` clips exp(s - b) instead of capping it. `advantage_clip` bounds t - s in the first two,
`turn_balance` gives the rows weights other than 1, and `entropy_coeff` takes that much of the entropy off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.config import LossConfig
from distill.types import Batch, LossOutput


class SupervisedLoss(LossConfig):
    """-log p_student of given tokens, whoever wrote them: what `python -m distill.sft` makes small. No `loss.type` of a
    run, whose tokens are the student's own; like `sampled`, it reads the target's log-probability alone."""


MAX_HEAD_MASS = 1 - 1e-6
"""Bounds the logarithms of the tail's mass. It enters the baseline alone, which no expectation depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRows:
    """All that a loss reads of the student's distributions."""

    s_N: torch.Tensor
    """log p_student of the target."""
    candidates_NK: torch.Tensor | None = None
    """log p_student of the teacher's ids, for `topk`."""
    kl_N: torch.Tensor | None = None
    """The exact reverse KL, for `full`."""
    entropy_N: torch.Tensor
    """With gradient where `entropy_coeff` is above 0."""
    tempered_N: torch.Tensor
    """log p_student of the target at the sampling temperature, without gradient; `s_N` where that is 1."""


def reverse_kl_loss(
    logits_NV: torch.Tensor,
    batch: Batch,
    config: LossConfig,
    num_trained_step: int,
    teacher_logprobs_NV: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> LossOutput:
    """The loss of some trained rows, of their logits. `distill/head.py` has it of their features.

    Args:
        logits_NV: the student's, before softmax; row n predicts `batch.targets_N[n]`. float64 stays float64, anything
            narrower than float32 is widened to it.
        batch: of the rows only the `*_N` and `*_NK` tensors are read; they follow the device of `logits_NV`.
        num_trained_step: trained tokens of the whole step, over all micro-batches and ranks: the denominator.
        teacher_logprobs_NV: log-softmax of a teacher in this process, for `full`.
        temperature: that the targets were sampled at. It enters `mismatch` alone; the policy that is trained is that
            of temperature 1, whatever sampled.

    Returns:
        The loss, and per row the numbers of `row_losses`.

    Raises:
        ValueError: what the loss type needs is not there, or the denominator is smaller than the rows.
    """
    check_denominator(num_trained_step, len(logits_NV))
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    ids_NK = candidate_ids(batch, config)
    # On a CPU, twice as fast as `logsumexp` and the gathered logits; the logits themselves are not needed again.
    logprobs_NV = logits_NV.log_softmax(-1)
    del logits_NV
    kl_N = None
    if config.type == "full":
        difference_NV = logprobs_NV - teacher_rows(teacher_logprobs_NV, logprobs_NV)
        kl_N = (logprobs_NV.exp() * difference_NV).sum(-1)
    targets_N = batch.targets_N.to(logprobs_NV.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.entropy_coeff > 0):
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    with torch.no_grad():
        tempered_N = at_temperature(logprobs_NV, targets_N, temperature)
    student = StudentRows(
        s_N=logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1),
        candidates_NK=None if ids_NK is None else logprobs_NV.gather(-1, ids_NK.to(logprobs_NV.device)),
        kl_N=kl_N,
        entropy_N=entropy_N,
        tempered_N=tempered_N,
    )
    rows_N, metrics_N = row_losses(student, batch, config)
    return LossOutput(loss=rows_N.sum() / num_trained_step, metrics_N=metrics_N)


def row_losses(student: StudentRows, batch: Batch, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[N] losses, each of its own row alone and not yet divided by anything.

    Returns:
        The losses, and per row, without gradient and in nats: `teacher_kl` (s - t), `k2`, `k3`, `entropy`, `ratio` (r),
        `clipped` (1 where the cap acted), `mismatch` (s at the sampling temperature - b), and with `advantage_clip`
        `advantage_clipped` (1 where it acted). Of a `SupervisedLoss`: `nll` (-s) and `entropy`.
    """
    s_N = student.s_N
    if isinstance(config, SupervisedLoss):
        return -batch.weights_N.to(s_N) * s_N, {"nll": -s_N.detach(), "entropy": student.entropy_N.detach()}
    t_N, b_N = batch.teacher_logprobs_N.to(s_N), batch.sampling_logprobs_N.to(s_N)
    with torch.no_grad():
        raw_ratio_N = (s_N - b_N).exp()
        r_N = raw_ratio_N.clamp(max=config.rho)
    clip = float("inf") if config.advantage_clip is None else config.advantage_clip
    metrics_N = _row_metrics(student, t_N, b_N, raw_ratio_N, config.rho)
    if config.surrogate == "ppo":
        advantage_N = config.teacher_tau * (t_N - s_N).detach().clamp(-clip, clip)
        if config.adv_tau:
            advantage_N = advantage_N + config.adv_tau * batch.advantages_N.to(s_N)
        rows_N, metrics_N["clipped"] = _ppo_rows(s_N, b_N, advantage_N, config)
        metrics_N["ratio"] = raw_ratio_N
    else:
        if config.type == "topk":
            teacher_N = _topk_rows(student, t_N, r_N, batch, clip)
        elif config.type == "full":
            assert student.kl_N is not None
            teacher_N = student.kl_N
        elif config.kl_estimator == "k2":
            teacher_N = r_N * (s_N - t_N).square() / 2
        else:
            teacher_N = -r_N * (t_N - s_N).detach().clamp(-clip, clip) * s_N
        rows_N = config.teacher_tau * teacher_N
        if config.adv_tau:
            rows_N = rows_N - r_N * config.adv_tau * batch.advantages_N.to(s_N) * s_N
    if config.entropy_coeff:
        rows_N = rows_N - config.entropy_coeff * student.entropy_N
    if config.advantage_clip is not None:
        metrics_N["advantage_clipped"] = ((s_N - t_N).detach().abs() > clip).to(s_N.dtype)
    return batch.weights_N.to(s_N) * rows_N, metrics_N


def _ppo_rows(
    s_N: torch.Tensor, b_N: torch.Tensor, advantage_N: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(q A, clip(q) A) with q = exp(s - b): PPO, arXiv 1707.06347, equation 7; and 1 where the clip acted."""
    q_N = (s_N - b_N).exp()
    free_N = q_N * advantage_N
    clipped_N = q_N.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage_N
    return -torch.minimum(free_N, clipped_N), (clipped_N < free_N).detach().to(s_N.dtype)


def _topk_rows(student: StudentRows, t_N: torch.Tensor, r_N: torch.Tensor, batch: Batch, clip: float) -> torch.Tensor:
    """With d_v = log p_student(v) - log p_teacher(v) and any baseline c that does not depend on the sampled token,

        grad KL = sum_{v in K} (d_v - c) grad p_student(v)  +  E_y 1[y not in K] (d_y - c) grad log p_student(y)

    since the probabilities sum to one. The head is exact and needs no importance ratio; c is the KL between student and
    teacher with the tail lumped into one token, which is close to the mean of d. K = 0 is `sampled`, K = V is `full`.
    """
    assert batch.topk_ids_NK is not None
    assert batch.topk_logprobs_NK is not None
    assert student.candidates_NK is not None
    s_N, student_NK = student.s_N, student.candidates_NK
    teacher_NK = batch.topk_logprobs_NK.to(s_N)
    p_NK = student_NK.exp()
    d_NK = (student_NK - teacher_NK).detach().clamp(-clip, clip)
    with torch.no_grad():
        tail_N = 1 - p_NK.sum(-1).clamp(max=MAX_HEAD_MASS)
        teacher_tail_N = 1 - teacher_NK.exp().sum(-1).clamp(max=MAX_HEAD_MASS)
        c_N = (p_NK * d_NK).sum(-1) + tail_N * (tail_N.log() - teacher_tail_N.log())
        in_tail_N = ~(batch.topk_ids_NK == batch.targets_N[:, None]).any(-1).to(s_N.device)
    head_N = (p_NK * (d_NK - c_N[:, None])).sum(-1)
    sampled_N = r_N * ((s_N - t_N).detach().clamp(-clip, clip) - c_N) * s_N
    return head_N + torch.where(in_tail_N, sampled_N, torch.zeros_like(sampled_N))


@torch.no_grad()
def _row_metrics(
    student: StudentRows, t_N: torch.Tensor, b_N: torch.Tensor, raw_ratio_N: torch.Tensor, rho: float
) -> dict[str, torch.Tensor]:
    """Sample estimators k1, k2, k3 of KL(student || teacher): http://joschu.net/blog/kl-approx.html. k3 is a metric
    and never the loss: on policy, the gradient of its mean is that of the forward KL."""
    kl_N = student.s_N - t_N
    return {
        "teacher_kl": kl_N,
        "k2": kl_N.square() / 2,
        "k3": torch.expm1(-kl_N) + kl_N,
        "entropy": student.entropy_N.detach(),
        "ratio": raw_ratio_N.clamp(max=rho),
        "clipped": (raw_ratio_N > rho).to(kl_N.dtype),
        "mismatch": student.tempered_N - b_N,
    }


def at_temperature(logprobs_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """[N] log-probabilities of the targets if logits are divided by a temperature before the softmax."""
    s_N = logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    return s_N if temperature == 1 else s_N / temperature - (logprobs_NV / temperature).logsumexp(-1)


# --- what a loss needs, checked before anything is computed


def check_denominator(num_trained_step: int, num_rows: int) -> None:
    """Raises ValueError: the whole step cannot have fewer trained tokens than a part of it."""
    if num_trained_step < max(1, num_rows):
        raise ValueError(f"num_trained_step is {num_trained_step}, but the micro-batch alone has {num_rows} rows")


def candidate_ids(batch: Batch, config: LossConfig) -> torch.Tensor | None:
    """[N, K] ids whose log-probabilities the loss reads, beside the target's; None unless `topk`.

    Raises:
        ValueError: `topk`, and the teacher gave no candidates.
    """
    if config.type != "topk":
        return None
    if batch.topk_ids_NK is None or batch.topk_logprobs_NK is None:
        raise ValueError('loss.type "topk" needs the teacher\'s candidates; set teacher.top_k')
    return batch.topk_ids_NK


def teacher_rows(teacher_NV: torch.Tensor | None, student_NV: torch.Tensor) -> torch.Tensor:
    """The teacher's log-probabilities in the student's format, for `full`.

    Raises:
        ValueError: there are none, or they are of another vocabulary.
    """
    if teacher_NV is None:
        raise ValueError('loss.type "full" needs a teacher in this process: Student.set_teacher')
    if teacher_NV.shape != student_NV.shape:
        raise ValueError(
            f"loss.type \"full\": the teacher's rows have shape {list(teacher_NV.shape)}, the student's "
            f"{list(student_NV.shape)}; both need one vocabulary"
        )
    return teacher_NV.to(student_NV)
