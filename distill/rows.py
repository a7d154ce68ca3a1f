"""The logits of the trained rows of a model, and of no others.

A vocabulary of 150,000 makes the logits of a batch much larger than all else in it. Only the trained rows go through
the output head, and `head` is called on a slice of them at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RowModel:
    """A causal language model cut in front of its output head.

    Args:
        model: of `transformers`; may hold LoRA layers, but is not itself wrapped by PEFT.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._decoder: nn.Module = getattr(model, model.base_model_prefix)
        self.device: torch.device = next(model.parameters()).device
        self._plain = True
        self._plain = self._head_is_plain()

    @property
    def _head(self) -> nn.Linear:
        """Asked for each time: adapters may take the place of the layer."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Some models scale or cap their logits behind the head (Gemma 2, Cohere, Granite); then the whole model has
        to be called. Compared, not looked up: a list of models would never be complete."""
        vocab_size = self._head.weight.shape[0]
        ids_BT = (torch.arange(8, device=self.device) * 7 % vocab_size)[None]
        wanted_TV = self.model(input_ids=ids_BT, use_cache=False).logits[0]
        found_TV = self.head(self._decoder(input_ids=ids_BT, use_cache=False).last_hidden_state[0])
        # Wrongly "no" costs memory, wrongly "yes" trains on other logits: as tight as one rounding of bfloat16 allows.
        return found_TV.shape == wanted_TV.shape and torch.allclose(
            found_TV, wanted_TV.to(found_TV.dtype), rtol=5e-3, atol=1e-4
        )

    def features(self, ids_BT: torch.Tensor, seq_N: torch.Tensor, pos_N: torch.Tensor) -> torch.Tensor:
        """[N, H] what `head` takes. Padding on the right needs no mask: attention is causal."""
        ids_BT, rows = ids_BT.to(self.device), (seq_N.to(self.device), pos_N.to(self.device))
        if self._plain:
            hidden_NH: torch.Tensor = self._decoder(input_ids=ids_BT, use_cache=False).last_hidden_state[rows]
            return hidden_NH
        logits_NV: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False).logits[rows]
        return logits_NV

    def head(self, features_NH: torch.Tensor) -> torch.Tensor:
        """[N, V] logits, at least float32."""
        logits_NV: torch.Tensor = self._head(features_NH) if self._plain else features_NH
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()

    @property
    def vocab_size(self) -> int:
        return int(self._head.weight.shape[0])
