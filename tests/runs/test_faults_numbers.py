"""F18, F19, F24: numbers that are not finite, batches with nothing in them, memory that runs out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from distill.failures import exit_code_of
from distill.student import NumericError, OutOfMemory, Student
from tests.distill.training_cases import make_episodes, run_config, tiny_model, weights_of
from tests.runs import children
from tests.runs.conftest import Workplace


def state_of(student: Student) -> dict[str, torch.Tensor]:
    """Weights and optimiser state, copied."""
    return weights_of(student) | {name: tensor.clone() for name, tensor in student.optimizer.state().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


@pytest.mark.slow
def test_f18_a_gradient_that_is_no_number_ends_the_run_and_the_step_before_is_kept(workplace: Workplace) -> None:
    run = workplace.path / "runs" / "one"
    code = children.run(workplace.path, "--run-id", "one", prepare=children.poison_gradient, arguments=(3,))
    said = children.said(workplace.path)
    assert code == 6, said
    assert "step 3: the gradient is not finite" in said
    assert "3/t" in said  # the episodes by their ids
    assert "Traceback" not in said
    assert [line["step"] for line in workplace.lines("one")] == [1, 2]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert children.run(workplace.path, "--resume", str(run)) == 0  # the cause is gone


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f18_no_update_is_made_from_a_number_that_is_none(where: str, value: float) -> None:
    student = Student(tiny_model(), run_config())
    student.train_step(make_episodes(3), step=1)
    episodes = make_episodes(3)
    if where == "loss":
        trace = episodes[1].traces[0]
        assert trace.teacher_logprobs is not None
        trace.teacher_logprobs[trace.loss_mask.index(True)] = -math.inf if value == math.inf else value
    elif where == "gradient":
        student.parameters["model.norm.weight"].register_hook(lambda g: g + value)
    else:
        with torch.no_grad():
            student.parameters["model.norm.weight"][0] = value
    before = state_of(student)
    expected = ValueError if where == "loss" and math.isnan(value) else NumericError
    with pytest.raises(expected, match=r"1/task\d/0") as caught:  # a NaN score is refused when the batch is made
        student.train_step(episodes, step=2)
    assert equal(state_of(student), before)
    if expected is NumericError:
        assert exit_code_of(caught.value) == 6


def test_f18_a_loss_a_thousand_times_as_large_moves_no_weight_further() -> None:
    """There is no gate for it: the gradient is clipped and AdamW divides by its size. It is seen in `grad_norm`."""
    moved, norms = [], []
    for scale in (1.0, 1000.0):
        student = Student(tiny_model(), run_config(optim={"max_grad_norm": 1.0}))
        for step in (1, 2, 3):
            student.train_step(make_episodes(3, seed=step), step=step)
        before = weights_of(student)
        episodes = make_episodes(3, seed=4)
        for episode in episodes:
            trace = episode.traces[0]
            assert trace.teacher_logprobs is not None
            trace.teacher_logprobs = [None if v is None else v * scale for v in trace.teacher_logprobs]
        norms.append(student.train_step(episodes, step=4)["grad_norm"] or 0.0)
        moved.append(max(float((before[n] - t).abs().max()) for n, t in weights_of(student).items()))
    assert norms[1] > 100 * norms[0]
    assert moved[1] <= 3 * moved[0]
    assert moved[1] <= 10 * 1e-3  # a few times the learning rate


def test_f19_batches_with_nothing_or_next_to_nothing_in_them() -> None:
    student = Student(tiny_model(), run_config())
    before = state_of(student)
    empty = make_episodes(3)
    for episode in empty:  # tool output alone
        episode.traces[0].loss_mask = [False] * len(episode.traces[0])
    for given in (empty, []):
        with pytest.raises(NumericError, match="no trained token") as caught:
            student.train_step(given, step=1)
        assert exit_code_of(caught.value) == 6
        assert equal(state_of(student), before)

    mixed = make_episodes(3)
    for k, episode in enumerate(mixed):
        trace = episode.traces[0]
        first = trace.loss_mask.index(True)
        trace.loss_mask = [k == 1 and i == first for i in range(len(trace))]
    metrics = student.train_step(mixed, step=1)
    assert (metrics["train/tokens"], metrics["train/episodes"]) == (1, 1)  # the others are left out of the count
    assert all(value is not None and math.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_f24_memory_that_runs_out_stops_the_run_and_says_what_to_set(workplace: Workplace) -> None:
    run = workplace.path / "runs" / "one"
    flags = ("--run-id", "one", "--checkpoint.every", "100")
    code = children.run(workplace.path, *flags, prepare=children.out_of_memory, arguments=(3,))
    said = children.said(workplace.path)
    assert code == 9, said
    assert "step 3: out of memory on cpu" in said
    assert "--optim.micro_batch_tokens 8192 (it is 16384)" in said
    assert "Traceback" not in said
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000002"]  # saved although none was due
    assert children.run(workplace.path, "--resume", str(run), "--optim.micro_batch_tokens", "8192") == 0
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]


def test_f24_no_part_of_a_step_that_ran_out_of_memory_is_kept(tmp_path: Path) -> None:
    """Some micro-batches are through when one fails; done again, the step is the one that it would have been."""
    config = run_config(optim={"micro_batch_tokens": 60})
    episodes = make_episodes(6)
    calls = 0

    def fails_once(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("out of memory")

    student, undisturbed = Student(tiny_model(), config), Student(tiny_model(), config)
    handle = student.rows.model.model.layers[1].register_forward_pre_hook(fails_once)
    before = state_of(student)
    with pytest.raises(OutOfMemory, match=r"micro_batch_tokens \d+ \(it is 60\)"):
        student.train_step(episodes, step=1)
    assert calls == 3
    assert equal(state_of(student), before)
    assert all(p.grad is None for p in student.parameters.values())
    handle.remove()
    student.train_step(episodes, step=1)
    undisturbed.train_step(episodes, step=1)
    assert equal(state_of(student), state_of(undisturbed))
