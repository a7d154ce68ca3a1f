"""Rewards beside the teacher, other surrogates and estimators, the entropy bonus, several epochs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_loss import distributions, exact_gradient, gradients_by_token, relative_error, rows
from training_cases import gradients_of, make_episodes, run_config, tiny_model, weights_of

from distill.batch import group_advantages
from distill.config import LossConfig
from distill.config_rules import problems_of
from distill.loss import reverse_kl_loss
from distill.metrics import reward_metrics
from distill.student import Student

SIZE = 9


@pytest.mark.parametrize("options", [{"kl_estimator": "k2"}, {"surrogate": "ppo"}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_on_policy_the_expected_gradient_is_the_reverse_kls(options: dict[str, Any], seed: int) -> None:
    logits, teacher = distributions(seed)
    found = gradients_by_token(logits, teacher, LossConfig(**options))
    mean = logits.softmax(-1) @ found
    assert relative_error(mean, exact_gradient(logits, teacher)) < 1e-12


def test_k3_would_descend_another_kl_and_is_refused() -> None:
    """Why: the expected gradient of k3 by backpropagation is that of KL(teacher || student)."""
    logits, teacher = distributions(1)
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(-1)
    weights = student.detach().exp()
    k3 = torch.expm1(teacher - student) - (teacher - student)
    (weights * k3).sum().backward()
    forward = logits.clone().requires_grad_()
    (teacher.exp() * (teacher - forward.log_softmax(-1))).sum().backward()
    assert leaf.grad is not None
    assert forward.grad is not None
    torch.testing.assert_close(leaf.grad, forward.grad)
    assert relative_error(leaf.grad, exact_gradient(logits, teacher)) > 0.1
    [problem] = problems_of(run_config().model_copy(update={"loss": LossConfig(kl_estimator="k3")}))
    assert "forward KL" in problem.message


def ppo_gradient(moved: float, advantage: float) -> torch.Tensor:
    """Of s, for a token whose probability moved by the factor exp(moved) since it was sampled."""
    logits = torch.randn(1, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = logits.detach().log_softmax(-1)[0, 4]
    batch = rows([4], (s - moved)[None], (s + advantage)[None])
    reverse_kl_loss(logits, batch, LossConfig(surrogate="ppo"), 1).loss.backward()
    assert logits.grad is not None
    return logits.grad[0, 4] / -(1 - s.exp())


@pytest.mark.parametrize(
    ("moved", "advantage", "expected"),
    [
        (0.0, 2.0, 2.0),
        (0.1, 2.0, 2.0 * 1.10517),
        (0.5, 2.0, 0.0),  # went up far enough
        (-0.5, 2.0, 2.0 * 0.60653),  # went down though it should go up: nothing is clipped
        (-0.5, -2.0, 0.0),
        (0.5, -2.0, -2.0 * 1.64872),
    ],
)
def test_ppo_stops_where_a_token_has_moved_far_enough(moved: float, advantage: float, expected: float) -> None:
    assert float(ppo_gradient(moved, advantage)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_the_entropy_bonus_raises_the_entropy() -> None:
    logits, teacher = distributions(3)

    def gradient(coeff: float) -> torch.Tensor:
        leaf = logits[None].clone().requires_grad_()
        batch = rows([2], logits.log_softmax(-1)[2:3], teacher[2:3])
        reverse_kl_loss(leaf, batch, LossConfig(entropy_coeff=coeff), 1).loss.backward()
        assert leaf.grad is not None
        return leaf.grad[0]

    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    (-(logprobs.exp() * logprobs).sum()).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(gradient(0.3) - gradient(0.0), -0.3 * leaf.grad)


def test_advantages_of_a_group() -> None:
    episodes = make_episodes(6)
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    for i, (episode, reward) in enumerate(zip(episodes, rewards, strict=True)):
        episode.task = replace(episode.task, id="a" if i < 3 else "b")
        episode.reward = reward
    assert group_advantages(episodes) == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    deviation = (2 / 9) ** 0.5
    assert group_advantages(episodes, "std") == pytest.approx([2 / 3 / deviation, *[-1 / 3 / deviation] * 2, 0, 0, 0])


def test_groups_that_teach_by_reward_are_counted() -> None:
    episodes = make_episodes(6)
    for i, (episode, reward) in enumerate(zip(episodes, [1.0, 0.0, 1.0, 1.0, 0.0, None], strict=True)):
        episode.task = replace(episode.task, id="abc"[i // 2])
        episode.reward = reward
    assert reward_metrics(episodes)["reward/mixed_groups"] == 0.5, "the third has one reward alone"
    assert "reward/mixed_groups" not in reward_metrics(episodes[4:])


def test_pure_reinforcement_learning_ignores_the_teacher() -> None:
    episodes = make_episodes(4)
    for i, episode in enumerate(episodes):
        episode.task = replace(episode.task, id="same")
        episode.reward = float(i % 2)
    found = []
    for shift in (0.0, 3.0):
        for episode in episodes:
            scores = episode.traces[0].teacher_logprobs
            assert scores is not None
            episode.traces[0].teacher_logprobs = [None if t is None else t - shift for t in scores]
        student = Student(tiny_model(), run_config(loss={"teacher_tau": 0.0, "adv_tau": 1.0}))
        student.train_step(episodes, step=1)
        found.append(gradients_of(student))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])
    assert any(float(gradient.abs().max()) > 0 for gradient in found[0].values())


def test_several_epochs_go_on_from_the_updated_weights() -> None:
    episodes = make_episodes(5)
    twice = Student(tiny_model(), run_config(optim={"epochs": 2, "lr": 1e-2}))
    metrics = twice.train_step(episodes, step=1)
    once = Student(tiny_model(), run_config(optim={"lr": 1e-2}))
    first = once.train_step(episodes, step=1)
    second = once.train_step(episodes, step=1)
    assert metrics["teacher_kl"] == first["teacher_kl"], "the metrics of a step are those before its first update"
    assert metrics["last_epoch/teacher_kl"] == second["teacher_kl"] != first["teacher_kl"]
    assert metrics["last_epoch/ratio"] == second["ratio"]
    assert "last_epoch/ratio" not in first
    for name, weight in weights_of(twice).items():
        torch.testing.assert_close(weight, weights_of(once)[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"type": "topk", "surrogate": "ppo"}, "loss.surrogate"),
        ({"type": "full", "kl_estimator": "k2"}, "loss.kl_estimator"),
        ({"kl_estimator": "k2", "surrogate": "ppo"}, "loss.kl_estimator"),
        ({"kl_estimator": "k2", "advantage_clip": 1.0}, "loss.advantage_clip"),
    ],
)
def test_what_cannot_hold_together(options: dict[str, Any], key: str) -> None:
    [problem] = problems_of(run_config().model_copy(update={"loss": LossConfig(**options)}))
    assert problem.keys[0] == key


def test_no_teacher_is_needed_where_it_weighs_nothing() -> None:
    config = run_config(loss={"adv_tau": 1.0, "teacher_tau": 0.0})
    without = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": None})})
    assert list(problems_of(without)) == []
    taught = without.model_copy(update={"loss": LossConfig(adv_tau=1.0)})
    assert "teacher.model" in [problem.keys[0] for problem in problems_of(taught)]
