"""Options that know of turns: balanced weights, clipped log-ratios, fewer turns at first."""

from __future__ import annotations

import pytest
import torch
from test_loss import distributions, rows
from training_cases import gradients_of, make_episodes, run_config, tiny_model

from distill.batch import collate, items_of
from distill.config import CurriculumConfig, LossConfig, RolloutConfig
from distill.config_rules import problems_of
from distill.loss import reverse_kl_loss
from distill.student import Student


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_weights_of_a_step_sum_to_its_tokens_and_turns_get_equal_shares(balance: float) -> None:
    episodes = make_episodes(9, seed=3)
    items = items_of(episodes, turn_balance=balance)
    batch = collate(items, packed=False)
    count = batch.num_trained
    assert float(batch.weights_N.sum()) == pytest.approx(count)
    shares: dict[tuple[int, int], float] = {}
    lengths: dict[tuple[int, int], int] = {}
    for seq, turn, weight in zip(batch.seq_N.tolist(), batch.turns_N.tolist(), batch.weights_N.tolist(), strict=True):
        shares[seq, turn] = shares.get((seq, turn), 0.0) + weight
        lengths[seq, turn] = lengths.get((seq, turn), 0) + 1
    assert len(set(lengths.values())) > 3
    mean = count / len(lengths)
    for key, share in shares.items():
        assert share == pytest.approx((1 - balance) * lengths[key] + balance * mean, rel=1e-5)


def test_turn_balance_changes_the_gradient_and_no_split_does() -> None:
    episodes = make_episodes(6, seed=1)
    found = {}
    for balance, tokens in ((0.0, 10_000), (1.0, 10_000), (1.0, 40)):
        student = Student(
            tiny_model(), run_config(loss={"turn_balance": balance}, optim={"micro_batch_tokens": tokens})
        )
        student.train_step(episodes, step=1)
        found[balance, tokens] = gradients_of(student)
    plain, whole, split = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in found.values())
    torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-7)
    assert float((whole - plain).norm() / plain.norm()) > 0.01


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_clip_bounds_the_log_ratio_and_is_counted(kind: str) -> None:
    logits, teacher = distributions(5, scale=6.0)
    size = len(logits)
    student = logits.log_softmax(-1)
    batch = rows(
        list(range(size)),
        student,
        teacher,
        topk_ids_NK=teacher.topk(3).indices.expand(size, 3),
        topk_logprobs_NK=teacher.topk(3).values.expand(size, 3),
    )

    def gradient(clip: float | None, teacher_shift: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        from dataclasses import replace

        leaf = logits.expand(size, size).clone().requires_grad_()
        shifted = replace(batch, teacher_logprobs_N=batch.teacher_logprobs_N - teacher_shift)
        output = reverse_kl_loss(leaf, shifted, LossConfig(type=kind, advantage_clip=clip), size)  # type: ignore[arg-type]
        output.loss.backward()
        assert leaf.grad is not None
        return leaf.grad, output.metrics_N

    free, metrics = gradient(None)
    assert "advantage_clipped" not in metrics
    wide, metrics = gradient(1e6)
    torch.testing.assert_close(wide, free)
    assert not metrics["advantage_clipped"].any()
    cut, metrics = gradient(0.5)
    expected = ((student - teacher).abs() > 0.5).double()
    assert 0 < expected.sum() < size
    torch.testing.assert_close(metrics["advantage_clipped"], expected)
    assert not torch.allclose(cut, free)
    if kind == "sampled":  # a token far below the cap is as good as one at it
        far, _ = gradient(0.5, teacher_shift=50.0)
        further, _ = gradient(0.5, teacher_shift=500.0)
        torch.testing.assert_close(far, further)
        coefficient = (student - teacher).clamp(-0.5, 0.5) / size
        one_minus_p = coefficient * (1 - student.exp())
        torch.testing.assert_close(cut.diagonal(), one_minus_p)


def test_turns_of_a_step() -> None:
    rollout = RolloutConfig(max_turns=5, curriculum=CurriculumConfig(start=2, every=3))
    assert [rollout.limits(step).max_turns for step in range(1, 13)] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert rollout.limits(100).max_turns == 5
    assert rollout.limits().max_turns == 5, "evaluation has all turns"
    assert RolloutConfig(max_turns=5).limits(1).max_turns == 5


def test_what_cannot_hold_together() -> None:
    config = run_config()
    rollout = RolloutConfig(max_turns=3, curriculum=CurriculumConfig(start=4))
    [problem] = problems_of(config.model_copy(update={"rollout": rollout}))
    assert problem.keys[0] == "rollout.curriculum.start"
    loss = LossConfig(type="full", advantage_clip=1.0)
    [problem] = problems_of(config.model_copy(update={"loss": loss}))
    assert problem.keys[0] == "loss.advantage_clip"
