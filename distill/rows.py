"""The trained rows of a model, and no others: their features, their log-probabilities, their loss.

A vocabulary of 150,000 makes the logits of a batch much larger than all else in it. Only the trained rows go through
the output head, and only a slice of them at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.attention import NotPlainCausal, row_arguments, use_packed
from distill.config import LossConfig
from distill.head import head_loss, slice_rows
from distill.loss import reverse_kl_loss
from distill.types import Batch, Inputs

Rows = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A number and, per row, numbers without gradient."""

_PROBE = (0, 13, 32)
"""Boundaries of two short traces."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be made small."""

    config: LossConfig
    num_trained_step: int
    """Trained tokens of the whole step, over all micro-batches and ranks: the denominator."""
    teacher: RowModel | None = None
    """Of `loss.type = "full"`."""
    temperature: float = 1.0
    """That the targets were sampled at."""


class RowModel(nn.Module):
    """A causal language model cut in front of its output head.

    All that reads a weight happens inside `forward`, where a wrapper that shards weights (FSDP2) has gathered them.

    Args:
        model: of `transformers`; may hold LoRA layers, but is not itself wrapped by PEFT.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self._plain = True
        self._plain = self._head_is_plain()
        self.attention: str = model.config._attn_implementation
        """What the model came with, as `transformers` names it: for a copy that serves."""
        self.padded_because = self._pack()
        """Why traces are padded for this model; None where they are packed."""

    def forward(self, inputs: Inputs, objective: Objective | None = None) -> Rows:
        """The loss of a micro-batch (a `Batch`), or without an objective the log-probabilities of the targets.

        Returns:
            A scalar with gradient and the rows' metrics (`LossOutput`), or [N] log-probabilities and nothing.
        """
        features_NH = self.features(inputs)
        if objective is None:
            return self._logprobs(features_NH, inputs.targets_N), {}
        assert isinstance(inputs, Batch)
        return self._loss(features_NH, inputs, objective)

    def features(self, inputs: Inputs) -> torch.Tensor:
        """[N, H] what `head` takes. Padding on the right needs no mask: attention is causal."""
        arguments = {"input_ids": inputs.input_ids_BT.to(self.device), "use_cache": False}
        if inputs.boundaries is not None:
            arguments |= row_arguments(inputs.boundaries, self.device)
        rows = inputs.seq_N.to(self.device), inputs.pos_N.to(self.device)
        if self._plain:
            hidden_NH: torch.Tensor = self._decoder(**arguments).last_hidden_state[rows]
            return hidden_NH
        logits_NV: torch.Tensor = self.model(**arguments).logits[rows]
        return logits_NV

    def head(self, features_NH: torch.Tensor) -> torch.Tensor:
        """[N, V] logits, at least float32."""
        logits_NV: torch.Tensor = self._head(features_NH) if self._plain else features_NH
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()

    @property
    def vocab_size(self) -> int:
        return int(self._head.weight.shape[0])

    def _slice_size(self, num_rows: int) -> int:
        return slice_rows(num_rows, self.vocab_size, self.device)

    def _logprobs(self, features_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        size = self._slice_size(len(features_NH))
        parts = zip(features_NH.split(size), targets_N.to(self.device).split(size), strict=True)
        return torch.cat([self.head(f).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1) for f, t in parts])

    def _loss(self, features_NH: torch.Tensor, batch: Batch, objective: Objective) -> Rows:
        teacher_NH = None
        if objective.teacher is not None:
            with torch.no_grad():
                teacher_NH = objective.teacher.features(batch)

        def teacher_of(start: int, end: int) -> torch.Tensor:
            assert objective.teacher is not None
            assert teacher_NH is not None
            with torch.no_grad():
                return objective.teacher.head(teacher_NH[start:end]).log_softmax(-1)

        config, num_trained = objective.config, objective.num_trained_step
        teacher = None if teacher_NH is None else teacher_of
        # Exactly this class: adapters, quantised and sharded layers are others, and multiply in ways of their own.
        fused = not (config.type == "full" and config.entropy_coeff)
        if self._plain and fused and type(self._head) is nn.Linear:
            output = head_loss(features_NH, self._head, batch, config, num_trained, teacher, objective.temperature)
            return output.loss, output.metrics_N

        def of_slice(start: int, features_NH: torch.Tensor) -> Rows:
            end = start + len(features_NH)
            teacher_NV = teacher and teacher(start, end)
            output = reverse_kl_loss(
                self.head(features_NH), batch.rows(start, end), config, num_trained, teacher_NV, objective.temperature
            )
            return output.loss, output.metrics_N

        size = self._slice_size(len(features_NH))
        slices = features_NH.split(size)
        if len(slices) == 1:
            return of_slice(0, features_NH)
        parts: list[Rows] = [
            checkpoint(of_slice, size * i, part_NH, use_reentrant=False) for i, part_NH in enumerate(slices)
        ]
        metrics_N = {name: torch.cat([metrics[name] for _, metrics in parts]) for name in parts[0][1]}
        return torch.stack([loss for loss, _ in parts]).sum(), metrics_N

    @property
    def _decoder(self) -> nn.Module:
        decoder: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return decoder

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

    def _pack(self) -> str | None:
        """Take the attention of packed traces, or say why this model needs its own and leave it that."""
        ids_T = torch.randint(self.vocab_size, (_PROBE[-1],), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alone_TV = torch.cat([self._all_logprobs(ids_T[a:b]) for a, b in itertools.pairwise(_PROBE)])
        try:
            use_packed(self.model)
            with torch.enable_grad():
                reason = self._misfit(ids_T, alone_TV)
        except (NotPlainCausal, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
        if reason is not None:
            self.model.set_attn_implementation(self.attention)
        return reason

    def _misfit(self, ids_T: torch.Tensor, alone_TV: torch.Tensor) -> str | None:
        """What is wrong with two traces in one row; compared, not looked up, like the head.

        The second must have no gradient at all to the tokens of the first: that is exact in every precision, where
        a difference of log-probabilities could be rounding. And both must come out as they do alone.
        """
        seen: list[torch.Tensor] = []

        def cut(_module: nn.Module, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
            seen.append(embedded.detach().requires_grad_())
            return seen[-1]

        handle = self.model.get_input_embeddings().register_forward_hook(cut)
        try:
            packed_TV = self._all_logprobs(ids_T, torch.tensor(_PROBE))
        finally:
            handle.remove()
        second = packed_TV[_PROBE[1] :].gather(1, ids_T[_PROBE[1] :, None].to(self.device)).sum()
        (gradient_BTH,) = torch.autograd.grad(second, seen)
        # Both written so that NaN passes: broken weights are refused by the first step, with the episode's name.
        if float(gradient_BTH[0, : _PROBE[1]].abs().max()) > 0:
            return "a trace is seen by the next one in its row"
        off_by = float((packed_TV.detach() - alone_TV).abs().mean(-1).max())
        if off_by > (1e-3 if gradient_BTH.dtype in (torch.float32, torch.float64) else 0.5):
            return f"traces in one row come out {off_by:.2g} nats from what they are alone"
        return None

    def _all_logprobs(self, ids_T: torch.Tensor, boundaries: torch.Tensor | None = None) -> torch.Tensor:
        """[T, V] after each token."""
        pos_N = torch.arange(len(ids_T))
        inputs = Inputs(
            input_ids_BT=ids_T[None],
            boundaries=boundaries,
            seq_N=torch.zeros_like(pos_N),
            pos_N=pos_N,
            targets_N=ids_T,
        )
        return self.head(self.features(inputs)).log_softmax(-1)
