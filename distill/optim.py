"""AdamW with float32 masters, and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distill.config import OptimConfig

Place = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step 1, 2, ... `total_steps`.

    It rises linearly to `lr` over `warmup_steps`. `linear` and `cosine` then fall towards 0, which they would reach
    one step after the last: no step is spent at 0.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.lr * (1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class Optimizer:
    """AdamW over named parameters.

    A parameter narrower than float32 gets a float32 master: gradients of micro-batches are summed, clipped and applied
    there, and the parameter is its rounded copy. Without it, bfloat16 (8 bits) loses every update below 1/256 of a
    weight, which at usual learning rates is all of them. Parameters that are sharded over ranks are their own masters
    (FSDP2 rounds what it gathers).

    Matrices decay, vectors (norms, biases) do not.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        *,
        rounded: Collection[str] = (),
    ) -> None:
        """
        Args:
            rounded: names of parameters that are masters themselves, of weights that are used in narrower numbers.
        """
        self._config = config
        self._rounded = frozenset(rounded)
        self._total_steps = total_steps
        self._parameters = dict(parameters)
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            wide = parameter.dtype in (torch.float32, torch.float64)
            master = parameter if wide else nn.Parameter(parameter.detach().float())
            if not wide:
                parameter.register_post_accumulate_grad_hook(_GradientMover(master))
            self._masters[name] = master
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in self._masters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in self._masters.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
        )

    def zero_grad(self) -> None:
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def clip(self) -> float:
        """Scale the gradients down to `max_grad_norm`; returns their norm before.

        A norm that is not finite scales nothing.
        """
        gradients = [p.grad for p in self._masters.values() if p.grad is not None]
        if not gradients:
            return 0.0
        norm = _norm(gradients)
        if bool(norm.isfinite()):  # else the scale would spread it to all parameters
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._config.max_grad_norm, norm)
        return float(norm)

    def non_finite(self) -> list[str]:
        """Names of the parameters whose gradient is not finite."""
        return [n for n, p in self._masters.items() if p.grad is not None and not bool(_norm([p.grad]).isfinite())]

    def step(self, step: int) -> float:
        """Apply the gradients with the learning rate of `step`, and drop them.

        Returns:
            That learning rate.
        """
        lr = lr_at(step, self._total_steps, self._config)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._publish()
        self.zero_grad()
        return lr

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to save: `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`, and `/master` where there is one.

        They are the optimiser's own, not copies.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{name}/{key}"] = value
            if self._has_master(name):
                tensors[f"{name}/master"] = master.detach()
        return tensors

    def _has_master(self, name: str) -> bool:
        return self._masters[name] is not self._parameters[name] or name in self._rounded

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor], place: Place) -> None:
        """Take what `state` gave.

        Args:
            place: copies a tensor to where another is, in its number format and sharded as it is (`Ranks.place`).

        Raises:
            ValueError: it belongs to other parameters; nothing was changed.
        """
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("/")
            master = self._masters.get(name)
            if master is None:
                raise ValueError(f"optimiser state: there is no parameter {name!r}")
            if kind != "step" and tensor.shape != master.shape:
                raise ValueError(f"optimiser state: {key!r} has shape {list(tensor.shape)}, not {list(master.shape)}")
            by_name.setdefault(name, {})[kind] = tensor
        for name in self._masters:
            if self._has_master(name) and "master" not in by_name.get(name, {}):
                raise ValueError(f"optimiser state: {name!r} has no float32 master; was it saved with another dtype?")
        self._adamw.state.clear()
        for name, kinds in by_name.items():
            master = self._masters[name]
            if "master" in kinds:
                master.copy_(place(kinds.pop("master"), master))
            if kinds:
                # AdamW keeps its step count on the CPU, its moments beside the parameter.
                self._adamw.state[master] = {
                    kind: place(tensor, None if kind == "step" else master) for kind, tensor in sorted(kinds.items())
                }
        self._publish()


def _norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Over all of them, and over all ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _GradientMover:
    """A hook: add the gradient to the master's in float32, and free it."""

    def __init__(self, master: nn.Parameter) -> None:
        self._master = master

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        wide = parameter.grad.to(self._master.dtype)
        if self._master.grad is None:
            self._master.grad = wide
        else:
            self._master.grad.add_(wide)
        parameter.grad = None
