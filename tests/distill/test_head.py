"""Head and loss in slices: value and gradients are those of autograd on whole logits, and no logits are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import VOCAB, make_episodes, tiny_model

from distill import head as head_module
from distill.batch import collate, items_of
from distill.config import LossConfig
from distill.head import head_loss, slice_rows
from distill.loss import reverse_kl_loss
from distill.rows import Objective, RowModel
from distill.types import Batch, LossOutput

N, H, V, K = 11, 5, 23, 4
Loss = Callable[[torch.Tensor, nn.Linear, Batch, LossConfig, torch.Tensor], LossOutput]


def rows(seed: int = 0, *, count: int = N, vocab_size: int = V, hidden: int = H) -> tuple[Batch, torch.Tensor]:
    """Rows of the loss and the features that they come from, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    zeros = torch.zeros(count, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=zeros[None],
        lengths_B=torch.tensor([count]),
        seq_N=zeros,
        pos_N=torch.arange(count),
        targets_N=torch.randint(vocab_size, (count,), generator=generator),
        sampling_logprobs_N=-6 * floats(count),
        teacher_logprobs_N=-6 * floats(count),
        advantages_N=floats(count) - 0.5,
        weights_N=0.5 + floats(count),
        turns_N=zeros,
        classes_N=zeros,
        episodes_N=zeros,
        topk_ids_NK=torch.stack([torch.randperm(vocab_size, generator=generator)[:K] for _ in range(count)]),
        topk_logprobs_NK=-2 - 3 * floats(count, K),
    )
    return batch, 2 * floats(count, hidden) - 1


def linear(*, bias: bool = False, seed: int = 1, vocab_size: int = V, hidden: int = H) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(hidden, vocab_size, bias=bias, dtype=torch.float64)


def fused(
    features_NH: torch.Tensor, head: nn.Linear, batch: Batch, config: LossConfig, teacher_NV: torch.Tensor
) -> Any:
    def teacher(start: int, end: int) -> torch.Tensor:
        return teacher_NV[start:end]

    return head_loss(features_NH, head, batch, config, 2 * len(features_NH), teacher, 0.7)


def plain(
    features_NH: torch.Tensor, head: nn.Linear, batch: Batch, config: LossConfig, teacher_NV: torch.Tensor
) -> Any:
    return reverse_kl_loss(head(features_NH), batch, config, 2 * len(features_NH), teacher_NV, 0.7)


def gradients(loss: Loss, head: nn.Linear, config: LossConfig) -> tuple[LossOutput, list[torch.Tensor]]:
    """Of features, weight and bias."""
    batch, features_NH = rows()
    teacher_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(-1)
    leaves = [features_NH.requires_grad_(), *head.parameters()]
    output = loss(features_NH, head, batch, config, teacher_NV)
    return output, list(torch.autograd.grad(output.loss, leaves))


def slices_of(monkeypatch: pytest.MonkeyPatch, size: int, vocab_size: int = V) -> None:
    monkeypatch.setitem(head_module.SLICE_BYTES, "cpu", 4 * vocab_size * size)


CONFIGS = [
    LossConfig(type="sampled"),
    LossConfig(type="sampled", rho=1.0, adv_tau=0.7, teacher_tau=0.3),
    LossConfig(type="sampled", advantage_clip=1.5),
    LossConfig(type="topk"),
    LossConfig(type="topk", rho=1.0, adv_tau=0.7, advantage_clip=1.5),
    LossConfig(type="sampled", kl_estimator="k2", adv_tau=0.7),
    LossConfig(type="sampled", surrogate="ppo", adv_tau=0.7, advantage_clip=1.5),
    LossConfig(type="sampled", surrogate="ppo", entropy_coeff=0.3),
    LossConfig(type="topk", entropy_coeff=0.3),
    LossConfig(type="full"),
    LossConfig(type="full", rho=1.0, adv_tau=0.7, teacher_tau=0.3),
    LossConfig(type="full", adv_tau=0.7, teacher_tau=0.0),
]


@pytest.mark.parametrize("size", [1, 2, 4, N])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.model_dump(exclude_defaults=True).items()) or "default",
)
def test_value_metrics_and_gradients_are_those_of_autograd(
    config: LossConfig, bias: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices_of(monkeypatch, size)
    head = linear(bias=bias)
    found, found_gradients = gradients(fused, head, config)
    wanted, wanted_gradients = gradients(plain, head, config)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=1e-14)
    assert len(found_gradients) == len(wanted_gradients) == 2 + bias
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(other.norm())
    assert found.metrics_N.keys() == wanted.metrics_N.keys()
    for name, values_N in wanted.metrics_N.items():
        torch.testing.assert_close(found.metrics_N[name], values_N, rtol=1e-10, atol=1e-13)
        assert not found.metrics_N[name].requires_grad


@pytest.mark.parametrize("candidates", [1, V])
def test_any_number_of_candidates(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slices_of(monkeypatch, 3)
    head = linear()
    batch, features_NH = rows()
    ids_NK = torch.arange(candidates).expand(N, candidates)
    changes = {"topk_ids_NK": ids_NK, "topk_logprobs_NK": torch.full((N, candidates), -4.0, dtype=torch.float64)}
    batch = Batch(**{name: getattr(batch, name) for name in batch.__dataclass_fields__} | changes)
    features_NH.requires_grad_()
    found, wanted = (
        torch.autograd.grad(loss(features_NH, head, batch, LossConfig(type="topk"), features_NH).loss, features_NH)[0]
        for loss in (fused, plain)
    )
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())


def test_gradients_are_the_slope_of_the_value() -> None:
    """By differences, not by autograd. `full` alone is its own gradient: the others hold numbers fixed."""
    head, config = linear(bias=True), LossConfig(type="full")
    batch, features_NH = rows()
    teacher_NV = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    leaves = [features_NH.requires_grad_(), *head.parameters()]
    found = torch.autograd.grad(fused(features_NH, head, batch, config, teacher_NV).loss, leaves)
    step = 1e-5
    with torch.no_grad():
        for leaf, gradient in zip(leaves, found, strict=True):
            numbers, slopes = leaf.view(-1), []
            for i in range(len(numbers)):
                ends = []
                for sign in (1, -1):
                    numbers[i] += sign * step
                    ends.append(float(fused(features_NH, head, batch, config, teacher_NV).loss))
                    numbers[i] -= sign * step
                slopes.append((ends[0] - ends[1]) / (2 * step))
            torch.testing.assert_close(
                gradient.view(-1), torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["sampled", "topk", "full"])
def test_a_whole_model_has_the_gradients_of_transformers_own_logits(
    kind: Any, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every weight; a tied one gets both of its gradients."""
    slices_of(monkeypatch, 5, VOCAB)
    model, teacher = tiny_model(tied=tied).double(), tiny_model(9).double()
    batch = collate(items_of(make_episodes(4, top_k=K)), packed=False)
    count, config = batch.num_trained, LossConfig(type=kind)
    teacher_rows = RowModel(teacher.requires_grad_(False)) if kind == "full" else None
    RowModel(model)(batch, Objective(config, count, teacher_rows))[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits_NV = model(input_ids=batch.input_ids_BT).logits[batch.seq_N, batch.pos_N]
    with torch.no_grad():
        teacher_NV = teacher(input_ids=batch.input_ids_BT).logits[batch.seq_N, batch.pos_N].log_softmax(-1)
    reverse_kl_loss(logits_NV, batch, config, count, teacher_NV).loss.backward()
    for name, p in model.named_parameters():
        gradient = found[name]
        assert gradient is not None
        assert p.grad is not None
        assert float((gradient - p.grad).norm()) <= 1e-9 * float(p.grad.norm()), name


class Made(TorchDispatchMode):
    """Bytes of every storage that was allocated, by its address."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {t.untyped_storage().data_ptr() for t in given}
        self.by_address: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._given:
                storage = tensor.untyped_storage()
                self.by_address[storage.data_ptr()] = max(storage.nbytes(), self.by_address.get(storage.data_ptr(), 0))
        return output

    def above(self, size: int) -> list[int]:
        return sorted(n for n in self.by_address.values() if n > size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LossConfig(type=t) for t in ("sampled", "topk", "full")], ids=lambda c: c.type)
def test_nothing_larger_than_a_slice_is_made_but_one_gradient_of_the_head(
    config: LossConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole logits would be 240 x 1,009 numbers, the head is 64 x 1,009, a slice 8 x 1,009. Two passes, as
    micro-batches: the second is added to what the first gave."""
    count, hidden, vocab_size = 240, 64, 1009
    slice_bytes = 8 * vocab_size * 4
    monkeypatch.setitem(head_module.SLICE_BYTES, "cpu", slice_bytes)
    monkeypatch.setattr(head_module, "WEIGHT_CHUNK", 4 * vocab_size)
    batch, features_NH = rows(count=count, vocab_size=vocab_size, hidden=hidden)
    head = linear(vocab_size=vocab_size, hidden=hidden).to(dtype)
    teacher = linear(vocab_size=vocab_size, hidden=hidden, seed=3).to(dtype)
    features_NH = features_NH.to(dtype).requires_grad_()

    def teacher_of(start: int, end: int) -> torch.Tensor:
        return teacher(features_NH[start:end]).float().log_softmax(-1).detach()

    def run() -> Made:
        sums = [p.grad for p in (features_NH, head.weight) if p.grad is not None]
        with Made(features_NH, head.weight, teacher.weight, *sums) as made:
            head_loss(features_NH, head, batch, config, count, teacher_of).loss.backward()
        return made

    assert slice_bytes > features_NH.nbytes / 2
    head_bytes = hidden * vocab_size * 4
    assert run().above(max(slice_bytes, features_NH.nbytes)) == [head_bytes]
    assert head.weight.grad is not None
    assert run().above(max(slice_bytes, features_NH.nbytes)) == [head_bytes]

    head.requires_grad_(False)
    assert run().above(max(slice_bytes, features_NH.nbytes)) == [], "a frozen head has no gradient, not even a buffer"
    head.requires_grad_()
    with torch.no_grad(), Made(features_NH, head.weight, teacher.weight) as made:
        assert not head_loss(features_NH, head, batch, config, count, teacher_of).loss.requires_grad
    assert made.above(slice_bytes) == []


def test_a_frozen_head_or_frozen_features() -> None:
    for frozen in (0, 1):
        head = linear()
        batch, features_NH = rows()
        leaves = [features_NH.requires_grad_(frozen != 0), head.weight.requires_grad_(frozen != 1)]
        found, wanted = (
            torch.autograd.grad(loss(features_NH, head, batch, LossConfig(), features_NH).loss, leaves[1 - frozen])[0]
            for loss in (fused, plain)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_bfloat16_is_close_and_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices must not be worse than one: their sums are not rounded to 8 bits one after the other."""
    count, hidden, vocab_size = 256, 32, 300
    batch, features_NH = rows(count=count, vocab_size=vocab_size, hidden=hidden)
    head = linear(vocab_size=vocab_size, hidden=hidden)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    features_NH = features_NH.bfloat16().double().requires_grad_()
    output = plain(features_NH, head, batch, LossConfig(type="topk"), features_NH)
    wanted = torch.autograd.grad(output.loss, [features_NH, head.weight])

    narrow = nn.Linear(hidden, vocab_size, bias=False, dtype=torch.bfloat16)
    narrow.load_state_dict(head.state_dict())
    for size in (count, 2):
        slices_of(monkeypatch, size, vocab_size)
        monkeypatch.setattr(head_module, "WEIGHT_CHUNK", 1000)
        narrow_NH = features_NH.detach().bfloat16().requires_grad_()
        loss = fused(narrow_NH, narrow, batch, LossConfig(type="topk"), features_NH).loss
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=2e-2)
        for found, exact in zip(torch.autograd.grad(loss, [narrow_NH, narrow.weight]), wanted, strict=True):
            assert found.dtype == torch.bfloat16
            assert float((found.double() - exact).norm()) < 0.01 * float(exact.norm()), size


def test_gradients_are_scaled_and_handed_out_once() -> None:
    head = linear()
    batch, features_NH = rows()
    features_NH.requires_grad_()
    (one,) = torch.autograd.grad(fused(features_NH, head, batch, LossConfig(), features_NH).loss, features_NH)
    loss = 3 * fused(features_NH, head, batch, LossConfig(), features_NH).loss
    (three,) = torch.autograd.grad(loss, features_NH, retain_graph=True)
    torch.testing.assert_close(three, 3 * one)
    with pytest.raises(RuntimeError, match="handed out by an earlier backward pass"):
        torch.autograd.grad(loss, features_NH)


def test_no_rows_are_a_loss_of_zero() -> None:
    """A rank may have none; its weights still take part in the sum over ranks."""
    head = linear(bias=True)
    batch, features_NH = rows()
    output = head_loss(features_NH[:0].requires_grad_(), head, batch.rows(0, 0), LossConfig(type="topk"), 5)
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert all(len(values_N) == 0 for values_N in output.metrics_N.values())


def test_what_is_missing_is_said() -> None:
    head = linear()
    batch, features_NH = rows()
    bare = Batch(
        **{n: None if n.startswith("topk") else getattr(batch, n) for n in batch.__dataclass_fields__}  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match=r"teacher\.top_k"):
        head_loss(features_NH, head, bare, LossConfig(type="topk"), N)
    with pytest.raises(ValueError, match="set_teacher"):
        head_loss(features_NH, head, batch, LossConfig(type="full"), N)
    with pytest.raises(ValueError, match=f"num_trained_step is 1, but the micro-batch alone has {N} rows"):
        head_loss(features_NH, head, batch, LossConfig(), 1)


def test_slices_are_as_few_as_the_bound_allows_and_of_one_size() -> None:
    cpu = torch.device("cpu")
    most = head_module.SLICE_BYTES["cpu"] // (4 * 151_936)
    assert slice_rows(most, 151_936, cpu) == most
    assert slice_rows(most + 1, 151_936, cpu) == -(-(most + 1) // 2)
    assert slice_rows(7, 10**9, cpu) == 1
    assert slice_rows(0, 100, cpu) == 1
