"""The expected gradient of each loss is that of the exact reverse KL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import LossConfig
from distill.loss import reverse_kl_loss
from distill.types import Batch

V = 9


def rows(targets: list[int], sampling: torch.Tensor, teacher: torch.Tensor, **more: Any) -> Batch:
    """A batch of rows alone; the loss reads nothing else."""
    count = len(targets)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(
        input_ids_BT=zeros[None],
        lengths_B=torch.tensor([count]),
        seq_N=zeros,
        pos_N=torch.arange(count),
        targets_N=torch.tensor(targets),
        sampling_logprobs_N=sampling,
        teacher_logprobs_N=teacher,
        advantages_N=more.pop("advantages", torch.zeros(count, dtype=sampling.dtype)),
        weights_N=more.pop("weights", torch.ones(count, dtype=sampling.dtype)),
        turns_N=zeros,
        classes_N=zeros,
        episodes_N=zeros,
        **more,
    )


def distributions(seed: int, size: int = V, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits and teacher log-probabilities of one position, in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    student = teacher + torch.randn(size, generator=generator, dtype=torch.float64)
    return student, teacher.log_softmax(-1)


def exact_gradient(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(-1)
    (student.exp() * (student - teacher)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def gradients_by_token(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    config: LossConfig,
    *,
    top_k: int = 0,
    sampler: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
) -> torch.Tensor:
    """[V, V] gradient of the loss for each token that could have been sampled."""
    size = len(logits)
    sampling = logits.log_softmax(-1) if sampler is None else sampler
    head = teacher.topk(top_k)
    leaf = logits.expand(size, size).clone().requires_grad_()
    batch = rows(
        list(range(size)),
        sampling,
        teacher,
        topk_ids_NK=head.indices.expand(size, top_k),
        topk_logprobs_NK=head.values.expand(size, top_k),
        advantages=torch.zeros(size, dtype=torch.float64) if advantages is None else advantages,
    )
    output = reverse_kl_loss(leaf, batch, config, size, teacher.expand(size, size))
    output.loss.backward()
    assert leaf.grad is not None
    return leaf.grad * size


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


LOSSES = [("sampled", 0), ("full", 0), *(("topk", k) for k in range(V + 1))]


@pytest.mark.parametrize(("kind", "top_k"), LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_that_of_the_reverse_kl(kind: Any, top_k: int, seed: int) -> None:
    logits, teacher = distributions(seed)
    gradients_VV = gradients_by_token(logits, teacher, LossConfig(type=kind, teacher_tau=0.7), top_k=top_k)
    expected = (logits.softmax(-1)[:, None] * gradients_VV).sum(0)
    assert relative_error(expected, 0.7 * exact_gradient(logits, teacher)) < 1e-6


@pytest.mark.parametrize(("kind", "top_k"), LOSSES)
def test_off_policy_the_ratio_corrects_it(kind: Any, top_k: int) -> None:
    logits, teacher = distributions(5)
    sampler = (logits + 0.5 * torch.randn(V, generator=torch.Generator().manual_seed(1))).double().log_softmax(-1)
    gradients_VV = gradients_by_token(logits, teacher, LossConfig(type=kind, rho=1000.0), top_k=top_k, sampler=sampler)
    expected = (sampler.exp()[:, None] * gradients_VV).sum(0)
    assert relative_error(expected, exact_gradient(logits, teacher)) < 1e-6


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_another_temperature_is_off_policy_too(temperature: float) -> None:
    """What is trained is the policy of temperature 1; `mismatch` compares at the temperature of the sampler."""
    logits, teacher = distributions(7)
    sampler = (logits / temperature).log_softmax(-1)
    gradients_VV = gradients_by_token(logits, teacher, LossConfig(rho=1000.0), sampler=sampler)
    expected = (sampler.exp()[:, None] * gradients_VV).sum(0)
    assert relative_error(expected, exact_gradient(logits, teacher)) < 1e-6

    found = reverse_kl_loss(
        logits.expand(V, V), rows(list(range(V)), sampler, teacher), LossConfig(), V, temperature=temperature
    ).metrics_N
    assert float(found["mismatch"].abs().max()) < 1e-12
    assert float((found["ratio"] - 1).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["sampled", "topk", "full"])
def test_advantage_term_is_the_policy_gradient(kind: Any) -> None:
    logits, teacher = distributions(6)
    rewards = torch.linspace(-1, 2, V, dtype=torch.float64)
    config = LossConfig(type=kind, teacher_tau=0.0, adv_tau=0.5)
    gradients_VV = gradients_by_token(logits, teacher, config, top_k=3, advantages=rewards)
    found = (logits.softmax(-1)[:, None] * gradients_VV).sum(0)
    leaf = logits.clone().requires_grad_()
    (-0.5 * (leaf.softmax(-1) * rewards).sum()).backward()
    assert leaf.grad is not None
    assert relative_error(found, leaf.grad) < 1e-6


def test_topk_has_a_fifth_of_the_variance_or_less() -> None:
    """At a head that holds .98 of the student's mass; 400 tokens, a position like those of docs/loss.md."""
    ratios = []
    for seed in range(20):
        logits, teacher = distributions(seed, size=400, scale=4.0)
        p = logits.softmax(-1)
        order = teacher.argsort(descending=True)
        top_k = int((p[order].cumsum(0) < 0.98).sum()) + 1
        variances = []
        for config, k in ((LossConfig(type="sampled"), 0), (LossConfig(type="topk"), top_k)):
            gradients_VV = gradients_by_token(logits, teacher, config, top_k=k)
            mean = (p[:, None] * gradients_VV).sum(0)
            variances.append(float((p * (gradients_VV - mean).square().sum(-1)).sum()))
        ratios.append(variances[0] / variances[1])
    assert sorted(ratios)[len(ratios) // 2] >= 5


def test_topk_without_candidates_is_sampled_and_with_all_is_full() -> None:
    logits, teacher = distributions(2)
    sampled = gradients_by_token(logits, teacher, LossConfig())
    full = gradients_by_token(logits, teacher, LossConfig(type="full"))
    torch.testing.assert_close(gradients_by_token(logits, teacher, LossConfig(type="topk"), top_k=0), sampled)
    torch.testing.assert_close(gradients_by_token(logits, teacher, LossConfig(type="topk"), top_k=V), full)


def test_equals_a_reference_in_plain_python() -> None:
    torch.manual_seed(0)
    logits_NV = torch.randn(5, V, dtype=torch.float64)
    targets, rho, tau, adv_tau = [0, 3, 8, 2, 2], 1.5, 0.8, 0.3
    b, t = [-2.0, -3.0, -1.0, -6.0, -2.5], [-1.0, -4.0, -2.0, -0.5, -3.0]
    a = [0.0, 1.0, -1.0, 0.5, 2.0]

    total = 0.0
    for row, y, b_n, t_n, a_n in zip(logits_NV.tolist(), targets, b, t, a, strict=True):
        s = row[y] - math.log(sum(math.exp(x) for x in row))
        r = min(math.exp(s - b_n), rho)
        total += -r * (tau * (t_n - s) + adv_tau * a_n) * s
    wanted = total / 17

    f64 = torch.float64
    batch = rows(targets, torch.tensor(b, dtype=f64), torch.tensor(t, dtype=f64), advantages=torch.tensor(a, dtype=f64))
    config = LossConfig(rho=rho, teacher_tau=tau, adv_tau=adv_tau)
    output = reverse_kl_loss(logits_NV, batch, config, 17)
    assert output.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert output.metrics_N["ratio"].max() <= rho
    assert output.metrics_N["clipped"].sum() == (output.metrics_N["ratio"] == rho).sum() > 0


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 12),
    top_k=st.integers(0, 12),
    kind=st.sampled_from(["sampled", "topk", "full"]),
    scale=st.floats(0.0, 5.0),
    tau=st.floats(0.1, 3.0),
)
def test_expected_gradient_whatever_the_distributions(
    seed: int, size: int, top_k: int, kind: Any, scale: float, tau: float
) -> None:
    logits, teacher = distributions(seed, size=size, scale=scale)
    config = LossConfig(type=kind, teacher_tau=tau)
    gradients_VV = gradients_by_token(logits, teacher, config, top_k=min(top_k, size))
    expected = (logits.softmax(-1)[:, None] * gradients_VV).sum(0)
    wanted = tau * exact_gradient(logits, teacher)
    assert float((expected - wanted).norm()) <= 1e-6 * float(wanted.norm()) + 1e-12


@settings(deadline=None, max_examples=60)
@given(data=st.data(), count=st.integers(1, 12), rho=st.floats(1.0, 5.0))
def test_rows_are_independent_of_each_other(data: st.DataObject, count: int, rho: float) -> None:
    """Any split and any order of the rows gives the same loss and the same gradient of every row."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits_NV = torch.randn(count, V, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(V, (count,), generator=generator).tolist()
    b, t = -6 * torch.rand(2, count, generator=generator, dtype=torch.float64)
    config = LossConfig(rho=rho)

    def run(order: list[int]) -> tuple[float, torch.Tensor]:
        leaf = logits_NV[order].clone().requires_grad_()
        batch = rows([targets[i] for i in order], b[order], t[order])
        output = reverse_kl_loss(leaf, batch, config, count)
        output.loss.backward()
        assert leaf.grad is not None
        return output.loss.item(), leaf.grad

    loss, gradient_NV = run(list(range(count)))
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    parts = [run(part) for part in (order[:cut], order[cut:]) if part]
    assert sum(value for value, _ in parts) == pytest.approx(loss, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient_NV[order], rtol=1e-9, atol=1e-12)


def test_metrics_are_unbiased_and_carry_no_gradient() -> None:
    logits, teacher = distributions(3)
    leaf = logits.expand(V, V).clone().requires_grad_()
    batch = rows(list(range(V)), logits.log_softmax(-1), teacher)
    found = reverse_kl_loss(leaf, batch, LossConfig(), V).metrics_N
    assert not any(values.requires_grad for values in found.values())
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    kl = float((p * (log_p - teacher)).sum())
    assert float((p * found["teacher_kl"]).sum()) == pytest.approx(kl)
    assert float((p * found["k3"]).sum()) == pytest.approx(kl)
    assert bool((found["k3"] >= 0).all())
    assert found["entropy"][0].item() == pytest.approx(-float((p * log_p).sum()))
    assert float(found["mismatch"].abs().max()) < 1e-12


def test_narrow_logits_are_widened_and_float64_stays() -> None:
    batch = rows([1, 2], torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        output = reverse_kl_loss(torch.randn(2, V, dtype=dtype), batch, LossConfig(), 2)
        assert output.loss.dtype == wanted


def test_a_student_that_is_the_teacher_has_no_gradient() -> None:
    logits, _ = distributions(4)
    teacher = logits.log_softmax(-1)
    for kind, top_k in LOSSES:
        gradients = gradients_by_token(logits, teacher, LossConfig(type=kind), top_k=top_k)  # type: ignore[arg-type]
        assert float(gradients.abs().max()) < 1e-6


def test_what_is_missing_is_said() -> None:
    batch = rows([1, 2], torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    logits_NV = torch.randn(2, V)
    with pytest.raises(ValueError, match=r"teacher\.top_k"):
        reverse_kl_loss(logits_NV, batch, LossConfig(type="topk"), 2)
    with pytest.raises(ValueError, match="set_teacher"):
        reverse_kl_loss(logits_NV, batch, LossConfig(type="full"), 2)
    with pytest.raises(ValueError, match="one vocabulary"):
        reverse_kl_loss(logits_NV, batch, LossConfig(type="full"), 2, torch.randn(2, V + 1))
    with pytest.raises(ValueError, match="num_trained_step is 1"):
        reverse_kl_loss(logits_NV, batch, LossConfig(), 1)
    empty = replace(batch, targets_N=batch.targets_N[:0])
    with pytest.raises(ValueError, match="num_trained_step is 0"):
        reverse_kl_loss(logits_NV[:0], empty, LossConfig(), 0)
