"""New weights into a model, from memory or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel


def copy_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | str | Path) -> None:
    """Overwrite a model's parameters, all or none.

    Raises:
        ValueError: naming the parameter that is missing, unknown, misshapen or not finite.
    """
    if isinstance(weights, (str, Path)):
        files = sorted(Path(weights).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{weights}: no *.safetensors in it")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    # Tied parameters appear under one name only.
    needed = dict(model.named_parameters())
    known = model.state_dict(keep_vars=True)
    if missing := sorted(needed.keys() - weights.keys()):
        raise ValueError(f"weights: {missing[0]!r} is missing, and {len(missing) - 1} more")
    if unknown := sorted(weights.keys() - known.keys()):
        raise ValueError(f"weights: the model has no parameter {unknown[0]!r} ({len(unknown)} unknown names)")
    for name, tensor in weights.items():
        if tensor.shape != known[name].shape:
            raise ValueError(f"weights: {name!r} has shape {list(tensor.shape)}, not {list(known[name].shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"weights: {name!r} holds values that are not finite")
        tied = next((n for n, p in needed.items() if p is known[name] and n != name), None)
        if tied is not None and not bool((tensor == weights[tied]).all()):
            raise ValueError(f"weights: {name!r} and {tied!r} are tied in this model, but differ")
    for name, tensor in weights.items():
        known[name].data.copy_(tensor)
