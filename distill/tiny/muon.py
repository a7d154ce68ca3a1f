"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum whose matrix is made orthogonal.

Matrices of one shape are stacked and orthogonalised in one batched call: a model of two layers has a dozen small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration of the reference: fast, singular values end between 0.7 and 1.2."""


def orthogonalise(matrices: torch.Tensor, num_steps: int = 5) -> torch.Tensor:
    """[..., M, N] to nearly orthogonal matrices of the same row and column space."""
    a, b, c = _COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)).

    Args:
        matrices: 2-D parameters.
        lr: step size, before the schedule's factor.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self._lr, self._momentum = lr, momentum

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with the learning rate `lr * factor`."""
        for group, buffer in self._groups:
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(buffer, self._momentum))
            rows, columns = buffer.shape[-2:]
            scale = self._lr * factor * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.sub_(change, alpha=scale)
